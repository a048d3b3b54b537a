//! The link of a device with those of other ranks, and the graphs that hold it: what ends in which order, and how the host
//! waits so that no peer can keep it waiting.

use super::Stream;
use super::device::check;
use crate::nccl::{Communicator, Nccl};
use crate::runtime::{GraphId, Membership};
use crate::{CudaError, DevicePtr};
use cudarc::driver::{result, sys};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// How long leaving a group that works may take.
const LEAVE_DEADLINE: Duration = Duration::from_secs(1);
/// Gathers after which those before are waited for: a queue that is full would keep a launch waiting where nobody watches.
const GATHERS_AHEAD: usize = 16;

/// Graphs and communicator of a device. All calls need the device's context to be current.
pub(super) struct Link {
    /// Where the library is looked for.
    place: Option<PathBuf>,
    nccl: Option<Arc<Nccl>>,
    state: State,
    graphs: Vec<sys::CUgraphExec>,
    gathers: Gathers,
}

enum State {
    None,
    Joined(Box<Communicator>),
    /// By a failure or on demand.
    Ended,
}

/// How far the host is ahead of the gathers it has queued.
struct Gathers {
    /// Recorded in turn, after so many gathers each.
    events: [sys::CUevent; 2],
    turn: usize,
    n_since: usize,
}

/// Work that the host waits for.
#[derive(Clone, Copy)]
pub(super) enum Work {
    /// Everything on a stream.
    Stream(sys::CUstream),
    /// What was before an event; nothing, when it was never recorded.
    Event(sys::CUevent),
}

impl Work {
    fn is_done(self) -> Result<bool, CudaError> {
        let (call, result) = match self {
            // SAFETY: the stream lives.
            Self::Stream(stream) => ("cuStreamQuery", unsafe { sys::cuStreamQuery(stream) }),
            // SAFETY: the event lives.
            Self::Event(event) => ("cuEventQuery", unsafe { sys::cuEventQuery(event) }),
        };
        match result {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            result => check(call, result.result()).map(|()| true),
        }
    }

    fn wait(self) -> Result<(), CudaError> {
        match self {
            Self::Stream(stream) => {
                // SAFETY: the stream lives.
                let result = unsafe { result::stream::synchronize(stream) };
                check("cuStreamSynchronize", result)
            }
            Self::Event(event) => {
                // SAFETY: the event lives.
                let result = unsafe { result::event::synchronize(event) };
                check("cuEventSynchronize", result)
            }
        }
    }
}

fn ended(call: &'static str) -> CudaError {
    CudaError::Device { call, problem: "the group of GPUs has ended".to_owned() }
}

impl Link {
    pub(super) fn new() -> Self {
        let gathers = Gathers { events: [std::ptr::null_mut(); 2], turn: 0, n_since: 0 };
        Self { place: None, nccl: None, state: State::None, graphs: Vec::new(), gathers }
    }

    pub(super) fn look_in(&mut self, place: Option<PathBuf>) {
        self.place = place;
    }

    /// The library, loaded when first asked for.
    pub(super) fn nccl(&mut self) -> Result<Arc<Nccl>, CudaError> {
        let nccl = match self.nccl.take() {
            Some(nccl) => nccl,
            None => Arc::new(Nccl::load(self.place.as_deref())?),
        };
        self.nccl = Some(Arc::clone(&nccl));
        Ok(nccl)
    }

    pub(super) fn join(&mut self, membership: Membership) -> Result<(), CudaError> {
        assert!(!matches!(self.state, State::Joined(_)), "a device is linked once");
        for event in self.gathers.events.iter_mut().filter(|event| event.is_null()) {
            let made = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
            *event = check("cuEventCreate", made)?;
        }
        self.state = State::Joined(Box::new(Communicator::join(&self.nccl()?, membership)?));
        Ok(())
    }

    /// Queues a gather; see [`crate::Runtime::all_gather`].
    pub(super) fn all_gather(
        &mut self,
        (from, to): (DevicePtr, DevicePtr),
        n_f32: usize,
        stream: Stream,
        is_capturing: bool,
    ) -> Result<(), CudaError> {
        let call = "ncclAllGather";
        let State::Joined(communicator) = &mut self.state else { return Err(ended(call)) };
        communicator.all_gather(from, to, n_f32, stream)?;
        if is_capturing { Ok(()) } else { self.keep_near(stream) }
    }

    /// Waits for the gathers before the last ones.
    fn keep_near(&mut self, stream: Stream) -> Result<(), CudaError> {
        self.gathers.n_since += 1;
        if self.gathers.n_since < GATHERS_AHEAD {
            return Ok(());
        }
        let Gathers { events, turn, n_since } = &mut self.gathers;
        *n_since = 0;
        // SAFETY: event and stream live.
        let result = unsafe { result::event::record(events[*turn], stream.0) };
        check("cuEventRecord", result)?;
        *turn = 1 - *turn;
        let before = events[*turn];
        self.wait(Work::Event(before))
    }

    /// Waits until the work is done, or the group fails; then the link has ended.
    pub(super) fn wait(&mut self, work: Work) -> Result<(), CudaError> {
        let watched = match &mut self.state {
            State::None => return work.wait(),
            State::Joined(communicator) => communicator.watch(&mut || work.is_done()),
            State::Ended => return Err(ended("waiting for the stream")),
        };
        if watched.is_err() {
            self.end();
        }
        watched
    }

    pub(super) fn keep(&mut self, graph: sys::CUgraphExec) -> GraphId {
        self.graphs.push(graph);
        GraphId(self.graphs.len() - 1)
    }

    pub(super) fn graph(&self, id: GraphId) -> Result<sys::CUgraphExec, CudaError> {
        self.graphs.get(id.0).copied().ok_or_else(|| ended("cuGraphLaunch"))
    }

    /// Destroys all graphs: those that run end first, without being waited for.
    pub(super) fn destroy_graphs(&mut self) {
        for graph in self.graphs.drain(..) {
            // SAFETY: instantiated by the driver, destroyed once.
            let _ = unsafe { result::graph::exec_destroy(graph) };
        }
    }

    /// Aborts what is under way: graphs go first, because a communicator waits for those that captured it.
    pub(super) fn end(&mut self) {
        if let State::Joined(communicator) = std::mem::replace(&mut self.state, State::Ended) {
            self.destroy_graphs();
            drop(communicator);
        }
    }

    /// Gives everything back, called once. A group that works is left in peace, if that is quick.
    pub(super) fn free(&mut self, stream: sys::CUstream) {
        if let State::Joined(mut communicator) = std::mem::replace(&mut self.state, State::Ended) {
            communicator.set_deadline(LEAVE_DEADLINE);
            let left = communicator.watch(&mut || Work::Stream(stream).is_done());
            self.destroy_graphs();
            if let Err(error) = left.and_then(|()| communicator.leave()) {
                tracing::debug!(%error, "left a group of GPUs by force");
            }
        }
        self.destroy_graphs();
        for event in self.gathers.events.iter().filter(|event| !event.is_null()) {
            // SAFETY: created by `join`, destroyed only here.
            let _ = unsafe { result::event::destroy(*event) };
        }
    }
}
