//! `HostileDraft`: a test double of a draft service for the hash model. From frame to frame it is good, wrong, late with
//! what it says, silent, talks what cannot be, or ends the stream. No token may ever depend on it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use paceline_domain::{SamplingParams, TokenId, group::PROTOCOL_VERSION};
use paceline_sampling::TokenHistory;
use paceline_wire::{
    draft::{
        ControlFrame, InfoRequest, InfoResponse, Nack, Proposal, ProposalFrame,
        draft_server::{Draft, DraftServer},
    },
    draft_frames,
};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

use crate::{
    hash_model::tokens_after,
    in_process::{CONTEXT, N_VOCAB, tokenizer_digest},
    random::Random,
};

/// What it does with a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mood {
    /// Proposes what the target will say.
    Good,
    /// The same, but for one token, where what is right is its second guess, of which it is surer than of others.
    Unsure,
    /// The same, but for one token.
    Wrong,
    /// Of another epoch, generation or place.
    Stale,
    /// What cannot be: ids, lengths.
    Nonsense,
    /// Claims to lack tokens, or all.
    Lacking,
    /// Says nothing.
    Silent,
    /// Ends the stream.
    Dying,
}

/// Most are good, so that it is not left out all the time.
const SELDOM: [Mood; 8] = {
    use Mood::{Dying, Lacking, Nonsense, Silent, Stale, Wrong};
    [Wrong, Wrong, Wrong, Stale, Silent, Lacking, Nonsense, Dying]
};
/// How often it is not good, and how often it is unsure then else.
const BADNESS: f64 = 0.25;
const DOUBT: f64 = 0.4;

/// Where it serves, and the task that does.
pub type Serving = (String, JoinHandle<Result<(), tonic::transport::Error>>);

/// A service; clones are the same one.
#[derive(Clone, Debug)]
pub struct HostileDraft {
    seed: u64,
    /// Of all frames, where it is not drawn anew for each.
    mood: Option<Mood>,
    n_streams: Arc<AtomicU64>,
}

/// What it knows of a sequence.
struct Session {
    generation: u32,
    epoch: u32,
    n_prompt: usize,
    sampling: SamplingParams,
    tokens: Vec<TokenId>,
    budget: usize,
}

impl HostileDraft {
    /// Serves until the task is dropped; where.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start(seed: u64) -> anyhow::Result<Serving> {
        Self::serve(seed, None).await
    }

    /// As [`Self::start`]; it says what the target will say, but in each proposal for one token, where that is its second guess.
    ///
    /// # Errors
    /// When no port is free.
    pub async fn start_unsure(seed: u64) -> anyhow::Result<Serving> {
        Self::serve(seed, Some(Mood::Unsure)).await
    }

    async fn serve(seed: u64, mood: Option<Mood>) -> anyhow::Result<Serving> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = format!("http://{}", listener.local_addr()?);
        let service = DraftServer::new(Self { seed, mood, n_streams: Arc::default() });
        let serving = Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener));
        Ok((address, tokio::spawn(serving)))
    }
}

#[tonic::async_trait]
impl Draft for HostileDraft {
    type SessionStream = ReceiverStream<Result<ProposalFrame, Status>>;

    async fn info(&self, _request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let digest = tokenizer_digest().map_err(|error| Status::internal(error.to_string()))?;
        Ok(Response::new(InfoResponse {
            protocol: PROTOCOL_VERSION,
            model: "hostile".into(),
            tokenizer_digest: digest.0.to_vec(),
            vocabulary_tokens: N_VOCAB as u32,
            context_tokens: CONTEXT as u32,
            max_sessions: 16,
        }))
    }

    async fn session(
        &self,
        request: Request<Streaming<ControlFrame>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let (outbox, answers) = mpsc::channel(64);
        let stream = self.n_streams.fetch_add(1, Ordering::Relaxed);
        let random = Random::new(self.seed ^ (stream << 32));
        tokio::spawn(answer(request.into_inner(), outbox, random, self.mood));
        Ok(Response::new(ReceiverStream::new(answers)))
    }
}

async fn answer(
    mut frames: Streaming<ControlFrame>,
    outbox: mpsc::Sender<Result<ProposalFrame, Status>>,
    mut random: Random,
    always: Option<Mood>,
) {
    let mut sessions = BTreeMap::new();
    while let Ok(Some(frame)) = frames.message().await {
        let mood = match (always, random.happens(BADNESS), random.happens(DOUBT)) {
            (Some(mood), ..) => mood,
            (None, true, _) => *random.pick(&SELDOM),
            (None, false, true) => Mood::Unsure,
            (None, false, false) => Mood::Good,
        };
        let told = take_in(&mut sessions, frame);
        if mood == Mood::Dying {
            return;
        }
        let mut frame = ProposalFrame::default();
        for id in told {
            say(mood, id, &sessions[&id], &mut frame, &mut random);
        }
        if outbox.send(Ok(frame)).await.is_err() {
            return;
        }
    }
}

/// Sessions that were told something and are to be drafted for.
fn take_in(sessions: &mut BTreeMap<u64, Session>, frame: ControlFrame) -> Vec<u64> {
    let (control, _) = draft_frames::control(frame);
    let mut told = Vec::new();
    for open in control.opens {
        told.push(open.session);
        let session = Session {
            generation: open.generation,
            epoch: 0,
            n_prompt: open.n_prompt as usize,
            sampling: open.sampling,
            tokens: open.tokens,
            budget: open.budget as usize,
        };
        sessions.insert(open.session, session);
    }
    for commit in control.commits {
        let Some(session) = sessions.get_mut(&commit.session) else { continue };
        told.push(commit.session);
        session.tokens.truncate(commit.base_len as usize);
        session.tokens.extend(commit.tokens);
        (session.epoch, session.budget) = (commit.epoch, commit.budget as usize);
    }
    for close in control.closes {
        sessions.remove(&close.session);
    }
    told.retain(|id| sessions.get(id).is_some_and(|session| session.budget > 0));
    told
}

fn say(mood: Mood, id: u64, session: &Session, frame: &mut ProposalFrame, random: &mut Random) {
    let Session { generation, epoch, n_prompt, sampling, tokens, budget } = session;
    let mut history = TokenHistory::new(*n_prompt);
    history.extend(tokens);
    let next = tokens_after(N_VOCAB, &history, sampling, *budget);
    let mut proposal = Proposal {
        session: id,
        generation: *generation,
        epoch: *epoch,
        start_pos: tokens.len() as u32,
        tokens: next.iter().map(|token| token.0).collect(),
        confidence: next.iter().map(|_| random.within(0..100) as f32 / 100.0).collect(),
        compute_us: random.bits() as u32,
        second_tokens: next.iter().map(|_| random.within(0..N_VOCAB) as u32).collect(),
        second_confidence: next.iter().map(|_| random.within(0..50) as f32 / 100.0).collect(),
    };
    let at = random.within(0..proposal.tokens.len().max(1));
    match mood {
        Mood::Good => {}
        Mood::Unsure => {
            proposal.second_tokens[at] = proposal.tokens[at];
            proposal.second_confidence[at] = random.within(50..100) as f32 / 100.0;
            proposal.tokens[at] = random.within(0..N_VOCAB) as u32;
        }
        Mood::Wrong => proposal.tokens[at] = random.within(0..N_VOCAB) as u32,
        Mood::Stale => match random.within(0..3) {
            0 => proposal.epoch += 1,
            1 => proposal.generation -= 1,
            _ => proposal.start_pos = random.within(0..2 * tokens.len()) as u32,
        },
        Mood::Nonsense => match random.within(0..5) {
            3 => proposal.second_tokens[at] = 60_000,
            4 => proposal.second_tokens = vec![1; 100],
            0 => proposal.tokens[at] = 60_000,
            1 => proposal.tokens = vec![1; 100],
            _ => proposal.confidence.clear(),
        },
        Mood::Lacking => {
            let have_len = if random.happens(0.5) { 0 } else { random.within(0..tokens.len()) as u32 };
            frame.nacks.push(Nack { session: id, generation: *generation, have_len });
            return;
        }
        Mood::Silent | Mood::Dying => return,
    }
    frame.proposals.push(proposal);
}
