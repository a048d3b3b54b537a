//! One rank's membership in an NCCL group. No wait in it lasts longer than its deadline, and each watches the abort flag.
//! After a failure nothing reaches the group any more, and the owner ends it: graphs first, then this, which aborts and so
//! frees the rank's stream from waiting for its peers.

use super::{Config, FLOAT32, Handle, IN_PROGRESS, Nccl, SUCCESS, UniqueId};
use crate::driver::Stream;
use crate::runtime::Membership;
use crate::{CudaError, DevicePtr};
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long to look without pause before sleeping between looks.
const SPIN: Duration = Duration::from_millis(2);
const NAP: Duration = Duration::from_micros(50);
/// Looks at the stream between two looks at the clock, the flag and the group.
const LOOKS: u32 = 64;

/// A member of a group; aborted when dropped. Graphs that captured its operations are destroyed before it, and it before
/// its device.
pub struct Communicator {
    nccl: Arc<Nccl>,
    /// Null once aborted.
    handle: Handle,
    membership: Membership,
    has_failed: bool,
}

// SAFETY: NCCL's handles may be used from any thread, one at a time, which `&mut self` ensures.
unsafe impl Send for Communicator {}

impl Communicator {
    /// Joins the group with the device that is current on this thread; every rank does so at the same time.
    ///
    /// # Errors
    /// What NCCL reports, a rank that is late, or the abort flag.
    pub fn join(nccl: &Arc<Nccl>, membership: Membership) -> Result<Self, CudaError> {
        let call = "ncclCommInitRankConfig";
        let (n_ranks, rank) = (membership.n_ranks as c_int, membership.rank as c_int);
        let id = UniqueId(membership.id);
        let mut joined =
            Self { nccl: Arc::clone(nccl), handle: std::ptr::null_mut(), membership, has_failed: false };
        let mut config = Config::NON_BLOCKING;
        // SAFETY: places for a handle and a configuration of the size it names.
        let code =
            unsafe { (nccl.calls.comm_init_rank_config)(&mut joined.handle, n_ranks, id, rank, &mut config) };
        let deadline = joined.membership.connect_deadline;
        joined.settle(call, code, deadline)?;
        Ok(joined)
    }

    /// Place of this rank.
    pub fn rank(&self) -> usize {
        self.membership.rank
    }

    /// Ranks in the group.
    pub fn n_ranks(&self) -> usize {
        self.membership.n_ranks
    }

    /// How long each following operation may take.
    pub fn set_deadline(&mut self, deadline: Duration) {
        self.membership.deadline = deadline;
    }

    /// Queues on `stream`: `recv` (`[n_ranks, n_f32]`) receives `send` (`[n_f32]`) of every rank. May be captured.
    ///
    /// # Errors
    /// What NCCL reports, a rank that is late, or the abort flag.
    pub fn all_gather(
        &mut self,
        send: DevicePtr,
        recv: DevicePtr,
        n_f32: usize,
        stream: Stream,
    ) -> Result<(), CudaError> {
        let call = "ncclAllGather";
        self.check_alive(call)?;
        // SAFETY: the handle lives; the ranges are on the device and the stream lives, by contract of the caller.
        let code = unsafe {
            (self.nccl.calls.all_gather)(
                send as *const c_void,
                recv as *mut c_void,
                n_f32,
                FLOAT32,
                self.handle,
                stream.handle(),
            )
        };
        self.settle(call, code, self.membership.deadline)
    }

    /// Waits until `is_done` says yes: usually that the stream is idle. A stream with operations of this communicator
    /// must be waited for by this and by nothing else.
    ///
    /// # Errors
    /// What `is_done` or NCCL reports, a rank that is late, or the abort flag.
    pub fn watch(&mut self, is_done: &mut dyn FnMut() -> Result<bool, CudaError>) -> Result<(), CudaError> {
        let call = "waiting for the stream";
        self.check_alive(call)?;
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS {
                match is_done() {
                    Ok(true) => return Ok(()),
                    Ok(false) => std::hint::spin_loop(),
                    Err(error) => return self.fail(error),
                }
                if start.elapsed() > SPIN {
                    break;
                }
            }
            match self.state() {
                SUCCESS | IN_PROGRESS => {}
                code => return self.fail(self.nccl.error(call, code)),
            }
            self.pause(call, start, self.membership.deadline)?;
        }
    }

    /// Leaves the group in peace: waits until all ranks are done with its operations.
    ///
    /// # Errors
    /// What NCCL reports, a rank that is late, or the abort flag.
    pub fn leave(mut self) -> Result<(), CudaError> {
        let call = "ncclCommFinalize";
        self.check_alive(call)?;
        // SAFETY: the handle lives.
        let code = unsafe { (self.nccl.calls.comm_finalize)(self.handle) };
        self.settle(call, code, self.membership.deadline)?;
        let handle = std::mem::replace(&mut self.handle, std::ptr::null_mut());
        // SAFETY: the handle lives, is final, and is not used again.
        let code = unsafe { (self.nccl.calls.comm_destroy)(handle) };
        self.nccl.check("ncclCommDestroy", code)
    }

    /// Ends whatever this rank has queued and frees the communicator; graphs that captured it are destroyed before. Every
    /// later operation is an error.
    pub fn abort(&mut self) {
        let handle = std::mem::replace(&mut self.handle, std::ptr::null_mut());
        if handle.is_null() {
            return;
        }
        // SAFETY: the handle lives and is not used again.
        let code = unsafe { (self.nccl.calls.comm_abort)(handle) };
        if let Err(error) = self.nccl.check("ncclCommAbort", code) {
            tracing::warn!(%error, "a communicator could not be aborted");
        }
    }

    /// Waits until a call that returned `code` has been carried out.
    fn settle(&mut self, call: &'static str, mut code: c_int, deadline: Duration) -> Result<(), CudaError> {
        let start = Instant::now();
        while code == IN_PROGRESS && !self.handle.is_null() {
            self.pause(call, start, deadline)?;
            code = self.state();
        }
        if code == SUCCESS { Ok(()) } else { self.fail(self.nccl.error(call, code)) }
    }

    /// What NCCL says of the communicator.
    fn state(&self) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the handle lives; the argument is a place for one number.
        let code = unsafe { (self.nccl.calls.comm_get_async_error)(self.handle, &mut state) };
        if code == SUCCESS { state } else { code }
    }

    /// Sleeps a little, if waiting may go on.
    fn pause(&mut self, call: &'static str, start: Instant, deadline: Duration) -> Result<(), CudaError> {
        let waited = start.elapsed();
        if (self.membership.is_aborted)() {
            return self.fail(CudaError::Aborted { call });
        }
        if waited > deadline {
            return self.fail(CudaError::Late { call, deadline });
        }
        if waited > SPIN {
            std::thread::sleep(NAP);
        }
        Ok(())
    }

    fn fail(&mut self, error: CudaError) -> Result<(), CudaError> {
        self.has_failed = true;
        Err(error)
    }

    fn check_alive(&self, call: &'static str) -> Result<(), CudaError> {
        if self.handle.is_null() || self.has_failed {
            return Err(CudaError::Device { call, problem: "the group of GPUs has ended".to_owned() });
        }
        Ok(())
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        self.abort();
    }
}

#[cfg(test)]
#[path = "communicator_tests.rs"]
mod tests;
