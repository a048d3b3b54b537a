//! A server and what it speaks, and what became of one request. Moments are taken where a client's code would first see
//! the text.

use std::time::Instant;

use super::{Options, arrivals::Planned, grpc::Grpc, openai::OpenAi, options::Protocol};

/// A server.
#[derive(Debug)]
pub enum Target {
    /// Paceline.
    Grpc(Grpc),
    /// Anything that speaks as OpenAI does.
    OpenAi(OpenAi),
}

/// How a request ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// With all of its answer.
    Finished,
    /// The client went away, as planned.
    Cancelled,
    /// The server has no place now.
    Refused,
    /// In any other way.
    Failed(String),
}

/// What came for a request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// It was sent.
    pub sent: Instant,
    /// Text came, by chunks.
    pub chunks: Vec<Instant>,
    /// Tokens of these chunks; a server that does not say so is taken at its word that a chunk is a token.
    pub n_tokens: u64,
    /// Tokens of the prompt that the server had in its cache, where it says so.
    pub n_cached: Option<u64>,
    /// How it ended, and when.
    pub outcome: Outcome,
    /// See `outcome`.
    pub ended: Instant,
    /// As [`Planned::tenant`].
    pub tenant: Option<usize>,
}

impl Answer {
    /// Nothing came yet.
    pub fn new(sent: Instant) -> Self {
        let outcome = Outcome::Failed("broken off by the user".into());
        Self { sent, chunks: Vec::new(), n_tokens: 0, n_cached: None, outcome, ended: sent, tenant: None }
    }

    /// A chunk with text came.
    pub fn chunk(&mut self, n_tokens: u64) {
        self.chunks.push(Instant::now());
        self.n_tokens += n_tokens;
    }

    /// Whether the client goes away now.
    pub fn is_enough(&self, planned: &Planned) -> bool {
        planned.cancelled_after.is_some_and(|most| self.chunks.len() as u64 >= u64::from(most))
    }
}

impl Target {
    /// Connects and finds out which model is asked for.
    ///
    /// # Errors
    /// When nobody answers, or the model is not there.
    pub async fn connect(options: &Options) -> anyhow::Result<Self> {
        Ok(match options.protocol {
            Protocol::Grpc => Self::Grpc(Grpc::connect(options).await?),
            Protocol::Openai => Self::OpenAi(OpenAi::connect(options).await?),
        })
    }

    /// Sends a request of client number `client` and reads its answer to the end. Dropping the future leaves in `answer`
    /// what came until then.
    pub async fn send(&self, client: usize, planned: &Planned, answer: &mut Answer) {
        let outcome = match self {
            Self::Grpc(target) => target.send(client, planned, answer).await,
            Self::OpenAi(target) => target.send(planned, answer).await,
        };
        answer.ended = Instant::now();
        answer.outcome = outcome.unwrap_or_else(|error| Outcome::Failed(format!("{error:#}")));
    }
}
