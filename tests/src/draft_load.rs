//! Requests without a pause while something happens to the draft service: whether their tokens are the right ones, and the
//! times between their chunks. It harms nothing itself.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use paceline_wire::inference::{
    GenerateRequest, GenerateResponse, SpeculationMode, SpeculationOptions, generate_response::Event,
    inference_client::InferenceClient,
};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::scrape::metric;

/// A request with the tokens it must get.
#[derive(Clone, Debug)]
pub struct Known {
    request: GenerateRequest,
    tokens: Vec<u32>,
}

/// What clients saw.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// Requests that ended.
    pub n_requests: usize,
    /// Those of them with other tokens than expected.
    pub n_different: usize,
    /// Tokens of a draft model that were verified for them.
    pub n_drafted: u64,
    /// Milliseconds between chunks with tokens.
    pub gaps_ms: Vec<f64>,
}

impl Seen {
    /// The gap that 99 of 100 do not exceed.
    pub fn p99_ms(&self) -> f64 {
        let mut gaps = self.gaps_ms.clone();
        gaps.sort_by(f64::total_cmp);
        let at = (gaps.len() * 99).div_ceil(100).saturating_sub(1);
        gaps.get(at).copied().unwrap_or(f64::NAN)
    }

    /// The longest gap.
    pub fn longest_ms(&self) -> f64 {
        self.gaps_ms.iter().copied().fold(0.0, f64::max)
    }

    fn merge(&mut self, other: Self) {
        self.n_requests += other.n_requests;
        self.n_different += other.n_different;
        self.n_drafted += other.n_drafted;
        self.gaps_ms.extend(other.gaps_ms);
    }
}

/// Requests with what they get without speculation.
///
/// # Errors
/// The status that the server answers.
pub async fn known(
    client: &InferenceClient<Channel>,
    requests: Vec<GenerateRequest>,
) -> Result<Vec<Known>, tonic::Status> {
    let mut known = Vec::new();
    for request in requests {
        let Answer { tokens, .. } = ask(client.clone(), with(&request, SpeculationMode::Off)).await?;
        known.push(Known { request, tokens });
    }
    Ok(known)
}

/// Runs `what` while `n_clients` ask, each one request after the other; and what they saw. Every client ends the request it
/// is at.
///
/// # Errors
/// The status that the server answers to a request.
pub async fn during<T>(
    client: &InferenceClient<Channel>,
    (known, mode): (&[Known], SpeculationMode),
    n_clients: usize,
    what: impl Future<Output = T>,
) -> Result<(T, Seen), tonic::Status> {
    let stop = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for first in 0..n_clients {
        let (client, known, stop) = (client.clone(), known.to_vec(), stop.clone());
        clients.spawn(keep_asking(client, (known, mode), first, stop));
    }
    let came_of_it = what.await;
    stop.store(true, Ordering::Relaxed);
    let mut all = Seen::default();
    while let Some(seen) = clients.join_next().await {
        all.merge(seen.expect("invariant: clients do not panic")?);
    }
    Ok((came_of_it, all))
}

async fn keep_asking(
    client: InferenceClient<Channel>,
    (known, mode): (Vec<Known>, SpeculationMode),
    first: usize,
    stop: Arc<AtomicBool>,
) -> Result<Seen, tonic::Status> {
    let mut seen = Seen::default();
    for known in known.iter().cycle().skip(first) {
        let answer = ask(client.clone(), with(&known.request, mode)).await?;
        seen.n_requests += 1;
        seen.n_different += usize::from(answer.tokens != known.tokens);
        seen.n_drafted += answer.n_drafted;
        seen.gaps_ms.extend(answer.gaps_ms);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(seen)
}

fn with(request: &GenerateRequest, mode: SpeculationMode) -> GenerateRequest {
    let options = SpeculationOptions { mode: Some(mode.into()), max_tokens: None };
    GenerateRequest { speculation: Some(options), ..request.clone() }
}

#[derive(Default)]
struct Answer {
    tokens: Vec<u32>,
    /// Milliseconds between its chunks.
    gaps_ms: Vec<f64>,
    n_drafted: u64,
}

async fn ask(
    mut client: InferenceClient<Channel>,
    request: GenerateRequest,
) -> Result<Answer, tonic::Status> {
    let mut stream = client.generate(request).await?.into_inner();
    let (mut answer, mut last) = (Answer::default(), None::<Instant>);
    while let Some(GenerateResponse { event, .. }) = stream.message().await? {
        match event {
            Some(Event::Delta(delta)) => {
                let now = Instant::now();
                answer.gaps_ms.extend(last.map(|last| (now - last).as_secs_f64() * 1e3));
                last = Some(now);
                answer.tokens.extend(delta.token_ids);
            }
            Some(Event::Finished(finished)) => {
                let drafted = finished.proposals.iter().filter(|counts| counts.source == "draft");
                answer.n_drafted += drafted.map(|counts| counts.draft_tokens).sum::<u64>();
            }
            _ => {}
        }
    }
    Ok(answer)
}

/// The tokens of the draft model that were verified so far.
pub const DRAFT_TOKENS: &str = "paceline_speculation_draft_tokens_total{source=\"draft\"}";

/// Waits until more tokens of the draft model are verified than now; after `deadline` it gives up. How long that took.
///
/// # Panics
/// When nobody answers.
pub async fn until_drafted(http: &str, deadline: Duration) -> Option<Duration> {
    let (start, before) = (Instant::now(), metric(http, DRAFT_TOKENS).await);
    while start.elapsed() < deadline {
        if metric(http, DRAFT_TOKENS).await > before {
            return Some(start.elapsed());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    None
}
