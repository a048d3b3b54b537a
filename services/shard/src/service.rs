//! The gRPC session: handshake, then plans in and results out. It holds no model state; closing the stream frees
//! everything. A session with a higher epoch takes the place of an older one.

use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, mpsc},
};

use futures_util::{Stream, StreamExt as _};
use paceline_collectives::{AbortFlag, BindSpec, Endpoint};
use paceline_domain::{ErrorKind, Quantization, StepMasks, StepPlan, group::PROTOCOL_VERSION};
use paceline_model::DeviceRoom;
use paceline_wire::{
    shard::{
        CoordinatorMessage, Form, Hello, Seat, ShardMessage, Welcome, coordinator_message, shard_message,
        shard_server::Shard,
    },
    status::status,
};
use tokio::sync::oneshot;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::executor::{self, MAX_PLANS_AHEAD, Machine, Outbox, Place, TracedPlan};

/// Masks that may wait for the executor: some parts for each plan.
const MAX_MASKS_AHEAD: usize = 64;

/// Serves one session at a time.
pub struct ShardService {
    machine: Machine,
    binding: BindSpec,
    active: Occupancy,
}

/// The session that holds the shard.
struct Active {
    epoch: u64,
    abort: AbortFlag,
    /// Dropped when another session takes the shard.
    _fence: oneshot::Sender<()>,
}

/// Comes when another session has taken the shard.
type Fence = oneshot::Receiver<()>;

/// Who holds the shard, if anybody.
#[derive(Clone, Default)]
struct Occupancy {
    active: Arc<Mutex<Option<Active>>>,
    /// Held by the session that may have weights and KV in memory: the next one waits until they are freed.
    memory: Arc<tokio::sync::Mutex<()>>,
}

impl Occupancy {
    fn lock(&self) -> MutexGuard<'_, Option<Active>> {
        self.active.lock().expect("invariant: no panic while the lock is held")
    }

    /// Gives the shard to a session and fences the one before it.
    fn enter(&self, epoch: u64, abort: &AbortFlag) -> Result<Fence, Status> {
        let mut active = self.lock();
        if let Some(active) = active.as_ref() {
            if epoch <= active.epoch {
                let message = format!("epoch {epoch} is not above the running one, {}", active.epoch);
                return Err(Status::aborted(message));
            }
            active.abort.abort();
        }
        let (sender, fence) = oneshot::channel();
        *active = Some(Active { epoch, abort: abort.clone(), _fence: sender });
        Ok(fence)
    }

    /// A session ended; a later one may hold the shard already.
    fn leave(&self, epoch: u64) {
        let mut active = self.lock();
        if active.as_ref().is_some_and(|active| active.epoch == epoch) {
            *active = None;
        }
    }
}

impl ShardService {
    /// A free shard.
    pub fn new(machine: Machine, binding: BindSpec) -> Self {
        Self { machine, binding, active: Occupancy::default() }
    }

    /// Checks a Hello and fences the session before it, if there is one.
    fn admit(&self, hello: &Hello, abort: &AbortFlag) -> Result<Fence, Status> {
        if hello.protocol != PROTOCOL_VERSION {
            let message = format!(
                "the coordinator speaks protocol {}, this shard {PROTOCOL_VERSION}: run the same version of both",
                hello.protocol
            );
            return Err(Status::failed_precondition(message));
        }
        let own = self.machine.checkpoint.digest();
        if hello.model_digest != own.0 {
            let theirs: String = hello.model_digest.iter().map(|byte| format!("{byte:02x}")).collect();
            let message = format!(
                "the coordinator serves model {theirs}, this shard has {own}: give both the same --model"
            );
            return Err(Status::failed_precondition(message));
        }
        let own = self.machine.quantize;
        if hello.quantize != own.map_or("", Quantization::name) {
            let theirs = if hello.quantize.is_empty() { "none" } else { &hello.quantize };
            let message = format!(
                "the coordinator serves weights with quantization {theirs}, this shard loads them with {}: give both the \
                 same --quantize",
                Quantization::name_or_none(own)
            );
            return Err(Status::failed_precondition(message));
        }
        self.active.enter(hello.epoch, abort)
    }
}

type MessageStream = Pin<Box<dyn Stream<Item = Result<ShardMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Shard for ShardService {
    type SessionStream = MessageStream;

    async fn session(
        &self,
        request: Request<Streaming<CoordinatorMessage>>,
    ) -> Result<Response<MessageStream>, Status> {
        let mut messages = request.into_inner();
        let Some(coordinator_message::Message::Hello(hello)) = next(&mut messages).await? else {
            return Err(Status::invalid_argument("a session begins with Hello"));
        };
        let abort = AbortFlag::new();
        let fence = self.admit(&hello, &abort)?;
        let inbox = Inbox { messages, fence };
        let endpoint =
            Endpoint::bind(&self.binding).map_err(|error| status(error.kind(), error.to_string()))?;
        let (outbox, messages) = tokio::sync::mpsc::channel(64);
        let session = Session {
            machine: self.machine.clone(),
            occupancy: self.active.clone(),
            epoch: hello.epoch,
            abort: abort.clone(),
            outbox,
        };
        tokio::spawn(session.run(inbox, endpoint, hello.seat.unwrap_or_default()));
        // The coordinator may vanish without a word: then the response stream is dropped, and the executor with it.
        let guard = AbortOnDrop(abort);
        let messages = ReceiverStream::new(messages).map(move |message| {
            let _held = &guard;
            message
        });
        Ok(Response::new(Box::pin(messages)))
    }
}

struct AbortOnDrop(AbortFlag);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Session {
    machine: Machine,
    occupancy: Occupancy,
    epoch: u64,
    abort: AbortFlag,
    outbox: Outbox,
}

impl Session {
    async fn send(&self, message: shard_message::Message) {
        let _ = self.outbox.send(Ok(ShardMessage { message: Some(message) })).await;
    }

    async fn run(self, inbox: Inbox, endpoint: Endpoint, seat: Seat) {
        let outcome = self.drive(inbox, endpoint, seat).await;
        self.abort.abort();
        self.occupancy.leave(self.epoch);
        if let Err(status) = outcome {
            tracing::warn!(epoch = self.epoch, code = ?status.code(), message = status.message(), "session ended");
            let _ = self.outbox.send(Err(status)).await;
        }
    }

    async fn drive(&self, mut inbox: Inbox, endpoint: Endpoint, seat: Seat) -> Result<(), Status> {
        let _memory = inbox.unless_fenced(self.occupancy.memory.clone().lock_owned()).await?;
        let welcome = self.welcome(&endpoint, seat).await?;
        self.send(shard_message::Message::Welcome(welcome)).await;
        let form = match inbox.next().await? {
            Some(coordinator_message::Message::Form(form)) => form,
            Some(_) => return Err(Status::invalid_argument("Hello is followed by Form")),
            None => return Ok(()),
        };
        check_form(&form, self.epoch)?;
        let (plans, plan_queue) = mpsc::sync_channel(MAX_PLANS_AHEAD);
        let (masks, mask_queue) = mpsc::sync_channel(MAX_MASKS_AHEAD);
        let feed = executor::Feed { plans: plan_queue, masks: mask_queue };
        let place = Place { form, endpoint, abort: self.abort.clone() };
        let executor =
            executor::start(self.machine.clone(), place, feed, self.outbox.clone()).map_err(|error| {
                status(ErrorKind::Unavailable, format!("no thread for the executor: {error}"))
            })?;
        let fed = feed_executor(&mut inbox, &Queues { plans, masks }).await;
        self.abort.abort();
        // Joining may take one forward pass: not on a thread of the runtime.
        match tokio::task::spawn_blocking(move || executor.join()).await {
            Ok(Ok(())) => fed,
            _ => Err(status(ErrorKind::Bug, "the executor panicked; its log says why")),
        }
    }

    /// Asking a device takes its time: not on a thread of the runtime.
    async fn welcome(&self, endpoint: &Endpoint, seat: Seat) -> Result<Welcome, Status> {
        let machine = self.machine.clone();
        let asked = tokio::task::spawn_blocking(move || machine.room(&seat)).await;
        let room = asked
            .map_err(|_| status(ErrorKind::Bug, "asking the device panicked; the log says why"))?
            .map_err(|error| status(error.kind(), error.to_string()))?;
        let mut welcome = Welcome {
            protocol: PROTOCOL_VERSION,
            peer_address: endpoint.address().to_string(),
            model_digest: self.machine.checkpoint.digest().0.to_vec(),
            ..Welcome::default()
        };
        if let Some(DeviceRoom { memory, usable_bytes, fixed_bytes, kv_block_bytes }) = room {
            tracing::info!(memory, usable_bytes, fixed_bytes, kv_block_bytes, "memory of the device");
            // A device that is full is limited too.
            welcome.memory_bytes = usable_bytes.max(1);
            (welcome.fixed_bytes, welcome.kv_block_bytes) = (fixed_bytes, kv_block_bytes);
            welcome.memory_id = memory;
        }
        Ok(welcome)
    }
}

/// The way to the executor.
struct Queues {
    plans: mpsc::SyncSender<TracedPlan>,
    masks: mpsc::SyncSender<StepMasks>,
}

/// Until the session is over, or the executor; that has said why.
async fn feed_executor(inbox: &mut Inbox, queues: &Queues) -> Result<(), Status> {
    while let Some(message) = inbox.next().await? {
        let goes_on = match message {
            coordinator_message::Message::Plan(mut plan) => {
                let trace = (std::mem::take(&mut plan.traceparent), std::mem::take(&mut plan.tracestate));
                let plan =
                    StepPlan::try_from(plan).map_err(|error| Status::invalid_argument(error.to_string()))?;
                hand_over(&queues.plans, TracedPlan { plan, trace }, MAX_PLANS_AHEAD)?
            }
            coordinator_message::Message::Masks(masks) => {
                hand_over(&queues.masks, masks.into(), MAX_MASKS_AHEAD)?
            }
            _ => return Err(Status::invalid_argument("after Form only plans and masks are sent")),
        };
        if !goes_on {
            break;
        }
    }
    Ok(())
}

/// Whether the executor is still there.
fn hand_over<T>(queue: &mpsc::SyncSender<T>, message: T, most: usize) -> Result<bool, Status> {
    match queue.try_send(message) {
        Ok(()) => Ok(true),
        Err(mpsc::TrySendError::Full(_)) => {
            Err(Status::resource_exhausted(format!("more than {most} plans or masks ahead")))
        }
        Err(mpsc::TrySendError::Disconnected(_)) => Ok(false),
    }
}

/// What the coordinator sends, until another session takes the shard.
struct Inbox {
    messages: Streaming<CoordinatorMessage>,
    fence: Fence,
}

impl Inbox {
    async fn next(&mut self) -> Result<Option<coordinator_message::Message>, Status> {
        let Self { messages, fence } = self;
        tokio::select! {
            message = next(messages) => message,
            _ = fence => Err(fenced()),
        }
    }

    async fn unless_fenced<T>(&mut self, wait: impl Future<Output = T>) -> Result<T, Status> {
        tokio::select! {
            done = wait => Ok(done),
            _ = &mut self.fence => Err(fenced()),
        }
    }
}

fn fenced() -> Status {
    Status::aborted("a session of a higher epoch has taken the shard")
}

fn check_form(form: &Form, epoch: u64) -> Result<(), Status> {
    let n_ranks = form.peer_addresses.len();
    if form.epoch != epoch {
        return Err(Status::aborted(format!("Form of epoch {} in a session of epoch {epoch}", form.epoch)));
    }
    if form.rank as usize >= n_ranks {
        return Err(Status::invalid_argument(format!("rank {} of {n_ranks}", form.rank)));
    }
    if form.n_kv_blocks == 0 || form.max_rows == 0 || form.vocabulary_tokens == 0 {
        return Err(Status::invalid_argument("Form needs KV blocks, rows and a vocabulary"));
    }
    Ok(())
}

async fn next(
    inbox: &mut Streaming<CoordinatorMessage>,
) -> Result<Option<coordinator_message::Message>, Status> {
    match inbox.message().await? {
        Some(CoordinatorMessage { message: Some(message) }) => Ok(Some(message)),
        Some(_) => Err(Status::invalid_argument("an empty or unknown message")),
        None => Ok(None),
    }
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
