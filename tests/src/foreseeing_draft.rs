//! The real draft service, with its sessions, its thread and its gRPC face, around a test double of a model: one that says
//! what the hash model will say. So its proposals are always worth a row.

use paceline_draft::{
    choice::Drafted,
    drafting::{self, MAX_COMMANDS},
    model::DraftModel,
    planner::{Chunk, PassLimits},
    service::{About, DraftService},
    sessions::{Limits, Sessions},
};
use paceline_model::ModelError;
use paceline_wire::draft::draft_server::DraftServer;
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tonic::transport::{Server, server::TcpIncoming};

use crate::{
    hash_model::tokens_after,
    in_process::{CONTEXT, N_VOCAB, tokenizer_digest},
};

const MAX_SESSIONS: usize = 16;
/// How sure it says to be of each token.
const CONFIDENCE: f32 = 0.95;

/// A running service; dropped, it ends.
#[derive(Debug)]
pub struct ForeseeingDraft {
    address: String,
    serving: JoinHandle<Result<(), tonic::transport::Error>>,
}

struct Foreseer;

impl DraftModel for Foreseer {
    fn run(&mut self, chunks: &[Chunk], sessions: &Sessions) -> Result<Vec<Drafted>, ModelError> {
        let next = |chunk: &Chunk| {
            let session = sessions.get(chunk.key).expect("invariant: chunks are of live sessions");
            let token = tokens_after(N_VOCAB, session.history(), session.sampling(), 1)[0];
            Drafted { token, confidence: CONFIDENCE, second: None }
        };
        Ok(chunks.iter().filter(|chunk| chunk.is_last).map(next).collect())
    }
}

impl ForeseeingDraft {
    /// Serves on a free port of this host.
    ///
    /// # Errors
    /// When there is no port or no thread.
    pub async fn start() -> anyhow::Result<Self> {
        let limits = Limits {
            max_sessions: MAX_SESSIONS,
            context: CONTEXT,
            n_vocab: N_VOCAB as u32,
            max_ahead: 16,
            n_kv_blocks: 1024,
        };
        let about = About {
            model: "foreseer".into(),
            tokenizer: tokenizer_digest()?,
            n_vocab: N_VOCAB as u32,
            context: CONTEXT as u32,
            max_sessions: MAX_SESSIONS as u32,
        };
        let (commands, queue) = mpsc::channel(MAX_COMMANDS);
        let pass = PassLimits { max_rows: 256, prompt_rows: 32 };
        drafting::start(Box::new(Foreseer), Sessions::new(limits), pass, queue)?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let service = DraftServer::new(DraftService::new(about, commands));
        let serving = Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener));
        Ok(Self { address, serving: tokio::spawn(serving) })
    }

    /// Where it listens, as `host:port`.
    pub fn address(&self) -> &str {
        &self.address
    }
}

impl Drop for ForeseeingDraft {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
