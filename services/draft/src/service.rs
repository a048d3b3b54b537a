//! The gRPC face: frames in and out, nothing else. A stream that ends takes its sessions with it.

use std::{
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
};

use futures_util::Stream;
use paceline_domain::{Digest, ErrorKind, group::PROTOCOL_VERSION};
use paceline_wire::{
    draft::{ControlFrame, InfoRequest, InfoResponse, ProposalFrame, draft_server::Draft},
    draft_frames,
    status::status,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::{
    drafting::{Command, MAX_ANSWERS},
    sessions::StreamId,
};

/// What the service proposes with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct About {
    /// Name of the model.
    pub model: String,
    /// Digest of its tokenizer.
    pub tokenizer: Digest,
    /// Usable tokens of its vocabulary.
    pub n_vocab: u32,
    /// Most tokens of one sequence.
    pub context: u32,
    /// Sequences it can hold at once.
    pub max_sessions: u32,
}

/// Serves any number of coordinators.
pub struct DraftService {
    about: About,
    commands: mpsc::Sender<Command>,
    n_streams: AtomicU64,
}

impl DraftService {
    /// In front of a drafting thread.
    pub fn new(about: About, commands: mpsc::Sender<Command>) -> Self {
        Self { about, commands, n_streams: AtomicU64::new(0) }
    }
}

type FrameStream = Pin<Box<dyn Stream<Item = Result<ProposalFrame, Status>> + Send>>;

#[tonic::async_trait]
impl Draft for DraftService {
    type SessionStream = FrameStream;

    async fn info(&self, _request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        Ok(Response::new(InfoResponse {
            protocol: PROTOCOL_VERSION,
            model: self.about.model.clone(),
            tokenizer_digest: self.about.tokenizer.0.to_vec(),
            vocabulary_tokens: self.about.n_vocab,
            context_tokens: self.about.context,
            max_sessions: self.about.max_sessions,
        }))
    }

    async fn session(
        &self,
        request: Request<Streaming<ControlFrame>>,
    ) -> Result<Response<FrameStream>, Status> {
        let stream = StreamId(self.n_streams.fetch_add(1, Ordering::Relaxed));
        let (outbox, answers) = mpsc::channel(MAX_ANSWERS);
        self.commands.send(Command::Join(stream, outbox)).await.map_err(|_| ended())?;
        tokio::spawn(read(request.into_inner(), stream, self.commands.clone()));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

fn ended() -> Status {
    status(ErrorKind::Unavailable, "the draft service is ending")
}

/// Passes frames on; the thread takes them in between two passes, and a coordinator that sends faster has to wait.
async fn read(mut frames: Streaming<ControlFrame>, stream: StreamId, commands: mpsc::Sender<Command>) {
    loop {
        let command = match frames.message().await {
            Ok(Some(frame)) => {
                let (control, malformed) = draft_frames::control(frame);
                Command::Control(stream, control, malformed)
            }
            Ok(None) => Command::Leave(stream),
            Err(status) => {
                tracing::debug!(stream = stream.0, code = ?status.code(), "stream ended");
                Command::Leave(stream)
            }
        };
        let is_last = matches!(command, Command::Leave(_));
        if commands.send(command).await.is_err() || is_last {
            return;
        }
    }
}
