//! The stream to the draft service: connects, compares tokenizers, carries frames, and connects again. It decides nothing
//! about sequences.

use std::time::Duration;

use paceline_domain::{Digest, DraftAnswer, group::PROTOCOL_VERSION};
use paceline_wire::{
    MAX_INTERNAL_MESSAGE_BYTES,
    draft::{ControlFrame, InfoRequest, InfoResponse, ProposalFrame, draft_client::DraftClient},
    draft_frames,
};
use tokio::{
    sync::{
        mpsc::{self, error::TrySendError},
        oneshot,
    },
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Streaming,
    transport::{Channel, Endpoint, Uri},
};

/// How long the service may take to accept a connection and to say what it is.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Pauses between attempts to connect, and before a service is asked again that must not be used.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(250));
const REFUSED_PAUSE: Duration = Duration::from_millis(500);
/// Frames that may wait to be sent; more wait only when the service does not read.
const OUTBOX: usize = 8;
/// Events that may wait for the drafter.
const EVENTS: usize = 64;

/// What the draft must fit.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Target {
    /// Name of the served model.
    pub model: String,
    /// Digest of its tokenizer.
    pub tokenizer: Digest,
    /// Usable tokens of its vocabulary.
    pub n_vocab: u32,
}

/// What the draft service says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct About {
    /// Name of the draft model.
    pub model: String,
    /// Most tokens of one sequence.
    pub context: usize,
    /// Sequences it can hold at once.
    pub max_sessions: usize,
}

/// The way to the service on one connection. Dropped, the connection is given up for another one.
#[derive(Debug)]
pub struct Outbox {
    frames: mpsc::Sender<ControlFrame>,
    _held: oneshot::Sender<()>,
}

/// Comes when an outbox was dropped.
type Dropped = oneshot::Receiver<()>;

/// What happens on the stream.
#[derive(Debug)]
pub enum LinkEvent {
    /// Connected; frames go into the outbox.
    Up(About, Outbox),
    /// It said something, and this many messages of it made no sense.
    Said(DraftAnswer, usize),
    /// The connection is gone, or there was none.
    Down(String),
    /// The service answers and must not be used.
    Refused(String),
}

/// A task that keeps the stream. Dropped, it ends.
#[derive(Debug)]
pub struct Link {
    events: mpsc::Receiver<LinkEvent>,
    task: JoinHandle<()>,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Outbox {
    /// Over a queue; with what tells its end.
    pub fn new(frames: mpsc::Sender<ControlFrame>) -> (Self, Dropped) {
        let (held, dropped) = oneshot::channel();
        (Self { frames, _held: held }, dropped)
    }

    /// Sends a frame without waiting.
    ///
    /// # Errors
    /// When the service does not read, or the connection is gone.
    pub fn try_send(&self, frame: ControlFrame) -> Result<(), TrySendError<ControlFrame>> {
        self.frames.try_send(frame)
    }
}

impl Link {
    /// Begins to connect. Must be called inside a Tokio runtime.
    pub fn start(service: Uri, target: Target) -> Self {
        let (sender, events) = mpsc::channel(EVENTS);
        let task = tokio::spawn(keep(service, target, sender));
        Self { events, task }
    }

    /// Over events that somebody else makes.
    #[cfg(test)]
    pub fn of(events: mpsc::Receiver<LinkEvent>) -> Self {
        Self { events, task: tokio::spawn(std::future::pending()) }
    }

    /// What has happened, without waiting.
    pub fn try_next(&mut self) -> Option<LinkEvent> {
        self.events.try_recv().ok()
    }

    /// What happens next. Safe to cancel.
    pub async fn next(&mut self) -> Option<LinkEvent> {
        self.events.recv().await
    }
}

/// Why there is no stream.
enum Failure {
    Unreachable(String),
    Refused(String),
}

async fn keep(service: Uri, target: Target, events: mpsc::Sender<LinkEvent>) {
    let mut pause = PAUSES.0;
    loop {
        let event = match open(&service, &target).await {
            Ok((about, frames, inbox)) => {
                pause = PAUSES.0;
                let (outbox, dropped) = Outbox::new(frames);
                if events.send(LinkEvent::Up(about, outbox)).await.is_err() {
                    return;
                }
                tokio::select! {
                    problem = read(inbox, &events) => Some(LinkEvent::Down(problem)),
                    // Whoever gave it up knows.
                    _ = dropped => None,
                }
            }
            Err(Failure::Unreachable(problem)) => Some(LinkEvent::Down(problem)),
            Err(Failure::Refused(problem)) => {
                pause = REFUSED_PAUSE;
                Some(LinkEvent::Refused(problem))
            }
        };
        if let Some(event) = event
            && events.send(event).await.is_err()
        {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Passes on what comes, until the stream ends; why it did.
async fn read(mut inbox: Streaming<ProposalFrame>, events: &mpsc::Sender<LinkEvent>) -> String {
    loop {
        match inbox.message().await {
            Ok(Some(frame)) => {
                let (answer, malformed) = draft_frames::answer(frame);
                if events.send(LinkEvent::Said(answer, malformed.len())).await.is_err() {
                    return "the coordinator is ending".into();
                }
            }
            Ok(None) => return "it closed the stream".into(),
            Err(status) => return format!("{:?}: {}", status.code(), status.message()),
        }
    }
}

type Stream = (About, mpsc::Sender<ControlFrame>, Streaming<ProposalFrame>);

async fn open(service: &Uri, target: &Target) -> Result<Stream, Failure> {
    let unreachable = |problem: String| Failure::Unreachable(format!("draft service {service}: {problem}"));
    let endpoint = Endpoint::from(service.clone())
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(Duration::from_secs(1))
        .keep_alive_timeout(Duration::from_secs(2))
        .keep_alive_while_idle(true);
    let channel =
        endpoint.connect().await.map_err(|error| unreachable(format!("cannot connect: {error}")))?;
    let mut client: DraftClient<Channel> = DraftClient::new(channel)
        .max_decoding_message_size(MAX_INTERNAL_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_INTERNAL_MESSAGE_BYTES);
    let info = timeout(CONNECT_TIMEOUT, client.info(InfoRequest {}));
    let info = info.await.map_err(|_| unreachable("it does not say what it is".into()))?;
    let info = info.map_err(|status| unreachable(status.message().to_owned()))?.into_inner();
    fits(&info, target).map_err(|problem| Failure::Refused(format!("draft service {service}: {problem}")))?;
    let (outbox, frames) = mpsc::channel(OUTBOX);
    let session = timeout(CONNECT_TIMEOUT, client.session(ReceiverStream::new(frames)));
    let session = session.await.map_err(|_| unreachable("it opens no session".into()))?;
    let inbox = session.map_err(|status| unreachable(status.message().to_owned()))?.into_inner();
    let about = About {
        model: info.model,
        context: info.context_tokens as usize,
        max_sessions: info.max_sessions as usize,
    };
    Ok((about, outbox, inbox))
}

/// Whether the draft's token ids mean what the target's mean.
fn fits(info: &InfoResponse, target: &Target) -> Result<(), String> {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let (draft, model) = (&info.model, &target.model);
    if info.protocol != PROTOCOL_VERSION {
        return Err(format!(
            "it speaks protocol {}, this coordinator {PROTOCOL_VERSION}: run the same version of both",
            info.protocol
        ));
    }
    if info.tokenizer_digest != target.tokenizer.0 {
        return Err(format!(
            "the tokenizer of draft model {draft} ({}) is not that of {model} ({}): take a draft of the same family",
            hex(&info.tokenizer_digest),
            hex(&target.tokenizer.0)
        ));
    }
    if info.vocabulary_tokens != target.n_vocab {
        return Err(format!(
            "draft model {draft} has {} tokens, {model} has {}: take a draft of the same family",
            info.vocabulary_tokens, target.n_vocab
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draft_that_does_not_fit_is_refused_with_both_sides_named() {
        let target = Target { model: "big".into(), tokenizer: Digest([1; 32]), n_vocab: 300 };
        let good = InfoResponse {
            protocol: PROTOCOL_VERSION,
            model: "small".into(),
            tokenizer_digest: vec![1; 32],
            vocabulary_tokens: 300,
            context_tokens: 100,
            max_sessions: 2,
        };
        assert_eq!(fits(&good, &target), Ok(()));
        let cases = [
            (InfoResponse { protocol: 1, ..good.clone() }, vec!["protocol 1", "same version"]),
            (
                InfoResponse { tokenizer_digest: vec![2; 32], ..good.clone() },
                vec!["small (0202", "big (0101"],
            ),
            (InfoResponse { vocabulary_tokens: 299, ..good }, vec!["small has 299", "big has 300"]),
        ];
        for (info, named) in cases {
            let problem = fits(&info, &target).expect_err("must be refused");
            named.iter().for_each(|part| assert!(problem.contains(part), "{problem} lacks {part}"));
        }
    }
}
