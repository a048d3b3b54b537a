//! One stream to each rank. It forms the group, sends every plan to all ranks and reports what comes back; what to
//! do about it is the engine's decision. All errors of a fan-out are kept.

use std::time::Duration;

use futures_util::future::join_all;
use paceline_domain::{Digest, Epoch, KvType, Quantization, StepPlan, StepResult, group::PROTOCOL_VERSION};
use paceline_model::DeviceRoom;
use paceline_wire::{
    MAX_INTERNAL_MESSAGE_BYTES,
    shard::{
        CoordinatorMessage, Form, Hello, Plan, Ready, Seat, ShardMessage, Welcome, coordinator_message,
        shard_client::ShardClient, shard_message,
    },
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Endpoint, Uri},
};

use crate::{
    pool::{self, PoolWish},
    router::Numerics,
};

/// How long a shard may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Plans and masks that may wait in a stream; no more than two steps are in flight.
const OUTBOX: usize = 32;

/// How to form a group.
#[derive(Clone, Debug)]
pub struct GroupSpec {
    /// Shards in rank order.
    pub shards: Vec<Uri>,
    /// The checkpoint they must have.
    pub model: Digest,
    /// What they must make of its float matrices.
    pub quantize: Option<Quantization>,
    /// What each rank's KV pool should be.
    pub pool: PoolWish,
    /// Storage type of the KV cache.
    pub kv_type: KvType,
    /// Most token rows in one step.
    pub max_rows: u32,
    /// Most rows with a sampled token in one step.
    pub max_sampled_rows: u32,
    /// Usable tokens of the vocabulary.
    pub n_vocab: u32,
    /// How long one collective may wait.
    pub collective_deadline: Duration,
}

/// What a rank says.
#[derive(Debug)]
pub struct RankEvent {
    /// Life of the group it belongs to.
    pub epoch: Epoch,
    /// Who.
    pub rank: usize,
    /// A result, or why there will be none any more.
    pub outcome: Result<StepResult, Status>,
}

/// Why no group could be formed: what each failing shard said.
#[derive(thiserror::Error, Debug)]
#[error("{}", .0.join("; "))]
pub struct FormError(pub Vec<String>);

/// Progress of loading: rank, bytes done, bytes in total.
pub type LoadReport = (usize, u64, u64);

/// A formed group.
#[derive(Debug)]
pub struct ShardGroup {
    epoch: Epoch,
    outboxes: Vec<mpsc::Sender<CoordinatorMessage>>,
    readers: Vec<JoinHandle<()>>,
    /// Blocks of each rank's KV pool.
    pub n_kv_blocks: u32,
    /// What each rank said when it was ready.
    pub ranks: Vec<Ready>,
}

impl Drop for ShardGroup {
    fn drop(&mut self) {
        self.readers.iter().for_each(JoinHandle::abort);
    }
}

impl ShardGroup {
    /// Connects to all shards, makes them a group and waits until every rank has loaded its slice.
    ///
    /// # Errors
    /// What each shard that failed has said. The sessions of the others are closed.
    pub async fn form(
        spec: &GroupSpec,
        epoch: Epoch,
        loading: mpsc::Sender<LoadReport>,
        events: mpsc::Sender<RankEvent>,
    ) -> Result<Self, FormError> {
        let sessions = all((0..spec.shards.len()).map(|rank| Session::open(rank, spec, epoch))).await?;
        let rooms: Vec<_> = sessions.iter().map(|session| session.room.clone()).collect();
        let n_kv_blocks = pool::n_blocks(spec.pool, &rooms).map_err(|problems| {
            FormError(
                problems.iter().map(|problem| format!("{:?}: {problem}", Code::FailedPrecondition)).collect(),
            )
        })?;
        let peer_addresses: Vec<String> =
            sessions.iter().map(|session| session.peer_address.clone()).collect();
        let mut secret = vec![0; 32];
        getrandom::fill(&mut secret)
            .map_err(|error| FormError(vec![format!("no random numbers: {error}")]))?;
        let form = |rank: usize| Form {
            epoch: epoch.0,
            rank: rank as u32,
            peer_addresses: peer_addresses.clone(),
            secret: secret.clone(),
            n_kv_blocks,
            kv_type: spec.kv_type.name().into(),
            max_rows: spec.max_rows,
            collective_deadline_ms: spec.collective_deadline.as_millis() as u64,
            vocabulary_tokens: spec.n_vocab,
            max_sampled_rows: spec.max_sampled_rows,
        };
        let ready = sessions.into_iter().enumerate().map(|(rank, session)| {
            let loading = loading.clone();
            session.load(rank, form(rank), loading)
        });
        let loaded = all(ready).await?;
        let numerics: Vec<u32> = loaded.iter().map(|(_, ready)| ready.numerics).collect();
        if numerics.iter().any(|version| *version != numerics[0]) {
            return Err(FormError(vec![format!(
                "the ranks compute with numerics versions {numerics:?}: run the same version everywhere"
            )]));
        }
        let (mut outboxes, mut readers, mut ranks) = (Vec::new(), Vec::new(), Vec::new());
        for (rank, (session, ready)) in loaded.into_iter().enumerate() {
            outboxes.push(session.outbox);
            readers.push(tokio::spawn(read(session.inbox, epoch, rank, events.clone())));
            ranks.push(ready);
        }
        Ok(Self { epoch, outboxes, readers, n_kv_blocks, ranks })
    }

    /// Life of this group.
    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Number of ranks.
    pub fn n_ranks(&self) -> usize {
        self.outboxes.len()
    }

    /// What the bits depend on beside the model, by rank: with other numbers the same tokens are not promised.
    pub fn device_numerics(&self) -> Vec<u32> {
        self.ranks.iter().map(|ready| ready.device_numerics).collect()
    }

    /// What the bits depend on beside model and flags; all ranks have the same version.
    pub fn numerics(&self) -> Numerics {
        Numerics::new(self.ranks[0].numerics, self.device_numerics())
    }

    /// Whether every rank's device copies KV blocks.
    pub fn copies_blocks(&self) -> bool {
        self.ranks.iter().all(|ready| ready.copies_blocks)
    }

    /// The way to each rank.
    pub fn outboxes(&self) -> &[mpsc::Sender<CoordinatorMessage>] {
        &self.outboxes
    }

    /// Sends a plan to every rank. A rank that cannot take it is reported by its reader.
    pub fn send(&self, plan: &StepPlan, trace: (String, String)) {
        let plan = Plan { traceparent: trace.0, tracestate: trace.1, ..Plan::from(plan) };
        let plans = std::iter::repeat_n(plan, self.outboxes.len());
        for ((rank, outbox), plan) in self.outboxes.iter().enumerate().zip(plans) {
            let message = Some(coordinator_message::Message::Plan(plan));
            if let Err(error) = outbox.try_send(CoordinatorMessage { message }) {
                tracing::debug!(rank, %error, "plan not sent");
            }
        }
    }
}

/// A stream to a shard that said Welcome.
struct Session {
    shard: Uri,
    peer_address: String,
    /// What its device has room for; none where it computes in the host's memory.
    room: Option<DeviceRoom>,
    outbox: mpsc::Sender<CoordinatorMessage>,
    inbox: Streaming<ShardMessage>,
}

impl Session {
    async fn open(rank: usize, spec: &GroupSpec, epoch: Epoch) -> Result<Self, String> {
        let shard = &spec.shards[rank];
        let named = |problem: String| format!("shard {shard}: {problem}");
        let channel = Endpoint::from(shard.clone())
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(1))
            .keep_alive_timeout(Duration::from_secs(4))
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(|error| named(format!("cannot connect: {}", chain(&error))))?;
        let mut client = ShardClient::new(channel)
            .max_decoding_message_size(MAX_INTERNAL_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_INTERNAL_MESSAGE_BYTES);
        let (outbox, messages) = mpsc::channel(OUTBOX);
        let hello = hello(rank, spec, epoch);
        send(&outbox, coordinator_message::Message::Hello(hello)).await.map_err(named)?;
        let response = client.session(ReceiverStream::new(messages)).await;
        let mut inbox = response.map_err(|status| named(said(&status)))?.into_inner();
        match next(&mut inbox).await.map_err(named)? {
            shard_message::Message::Welcome(welcome) => {
                let room = room(&welcome);
                Ok(Self { shard: shard.clone(), peer_address: welcome.peer_address, room, outbox, inbox })
            }
            other => Err(named(format!("answered Hello with {other:?}"))),
        }
    }

    async fn load(
        mut self,
        rank: usize,
        form: Form,
        loading: mpsc::Sender<LoadReport>,
    ) -> Result<(Self, Ready), String> {
        let shard = self.shard.clone();
        let named = |problem: String| format!("shard {shard} (rank {rank}): {problem}");
        send(&self.outbox, coordinator_message::Message::Form(form)).await.map_err(named)?;
        loop {
            match next(&mut self.inbox).await.map_err(named)? {
                shard_message::Message::Loading(report) => {
                    // Nobody has to listen to progress.
                    let _ = loading.try_send((rank, report.done_bytes, report.total_bytes));
                }
                shard_message::Message::Ready(ready) => return Ok((self, ready)),
                other => return Err(named(format!("answered Form with {other:?}"))),
            }
        }
    }
}

fn hello(rank: usize, spec: &GroupSpec, epoch: Epoch) -> Hello {
    let seat = Seat {
        rank: rank as u32,
        n_ranks: spec.shards.len() as u32,
        kv_type: spec.kv_type.name().into(),
        max_rows: spec.max_rows,
        max_sampled_rows: spec.max_sampled_rows,
    };
    Hello {
        protocol: PROTOCOL_VERSION,
        epoch: epoch.0,
        model_digest: spec.model.0.to_vec(),
        seat: Some(seat),
        quantize: spec.quantize.map_or("", Quantization::name).into(),
    }
}

fn room(welcome: &Welcome) -> Option<DeviceRoom> {
    (welcome.memory_bytes > 0).then(|| DeviceRoom {
        memory: welcome.memory_id.clone(),
        usable_bytes: welcome.memory_bytes,
        fixed_bytes: welcome.fixed_bytes,
        kv_block_bytes: welcome.kv_block_bytes,
    })
}

async fn send(
    outbox: &mpsc::Sender<CoordinatorMessage>,
    message: coordinator_message::Message,
) -> Result<(), String> {
    outbox
        .send(CoordinatorMessage { message: Some(message) })
        .await
        .map_err(|_| "the stream is closed".to_owned())
}

async fn next(inbox: &mut Streaming<ShardMessage>) -> Result<shard_message::Message, String> {
    match inbox.message().await {
        Ok(Some(ShardMessage { message: Some(message) })) => Ok(message),
        Ok(Some(_)) => Err("sent an empty or unknown message".into()),
        Ok(None) => Err("closed the stream".into()),
        Err(status) => Err(said(&status)),
    }
}

async fn read(
    mut inbox: Streaming<ShardMessage>,
    epoch: Epoch,
    rank: usize,
    events: mpsc::Sender<RankEvent>,
) {
    loop {
        let outcome = match next(&mut inbox).await {
            Ok(shard_message::Message::Result(result)) => {
                StepResult::try_from(result).map_err(|error| Status::internal(error.to_string()))
            }
            Ok(other) => Err(Status::internal(format!("answered a plan with {other:?}"))),
            Err(problem) => Err(Status::unavailable(problem)),
        };
        let is_last = outcome.is_err();
        if events.send(RankEvent { epoch, rank, outcome }).await.is_err() || is_last {
            return;
        }
    }
}

/// All results, or all failures.
async fn all<T>(
    attempts: impl Iterator<Item = impl Future<Output = Result<T, String>>>,
) -> Result<Vec<T>, FormError> {
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    for outcome in join_all(attempts).await {
        match outcome {
            Ok(value) => done.push(value),
            Err(problem) => failed.push(problem),
        }
    }
    if failed.is_empty() { Ok(done) } else { Err(FormError(failed)) }
}

fn said(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

/// An error with its causes, which tonic hides behind "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
#[path = "shard_group_tests.rs"]
mod tests;
