//! The waits of a communicator over a library that only pretends: what ends them, and what is aborted then.

use super::*;
use crate::nccl::{Calls, ID_BYTES, OLDEST};
use std::cell::RefCell;
use std::ffi::c_char;

const BROKEN: c_int = 6;

thread_local! {
    /// What the communicator's state will be, look by look; the last one stays.
    static STATES: RefCell<Vec<c_int>> = const { RefCell::new(Vec::new()) };
    static LOG: RefCell<Vec<&'static str>> = const { RefCell::new(Vec::new()) };
}

fn log(call: &'static str) -> c_int {
    LOG.with_borrow_mut(|log| log.push(call));
    SUCCESS
}

extern "C" fn get_version(_: *mut c_int) -> c_int {
    SUCCESS
}

extern "C" fn get_unique_id(_: *mut UniqueId) -> c_int {
    SUCCESS
}

extern "C" fn init(handle: *mut Handle, _: c_int, id: UniqueId, _: c_int, config: *mut Config) -> c_int {
    // SAFETY: the communicator's own configuration.
    let config = unsafe { &*config };
    assert_eq!((config.size, config.magic, config.blocking), (24, 0xcafe_beef, 0));
    assert_eq!(id.0, [5; ID_BYTES]);
    log("init");
    // SAFETY: the communicator's own place for a handle.
    unsafe { *handle = std::ptr::dangling_mut::<u64>().cast() };
    IN_PROGRESS
}

extern "C" fn state(_: Handle, state: *mut c_int) -> c_int {
    let next = STATES.with_borrow_mut(|all| if all.len() > 1 { all.remove(0) } else { all[0] });
    // SAFETY: the communicator's own place for a number.
    unsafe { *state = next };
    SUCCESS
}

extern "C" fn abort(_: Handle) -> c_int {
    log("abort")
}

extern "C" fn finalize(_: Handle) -> c_int {
    log("finalize");
    IN_PROGRESS
}

extern "C" fn destroy(_: Handle) -> c_int {
    log("destroy")
}

extern "C" fn all_gather(
    _: *const c_void,
    _: *mut c_void,
    n: usize,
    kind: c_int,
    _: Handle,
    _: *mut c_void,
) -> c_int {
    assert_eq!((n, kind), (12, FLOAT32));
    log("all-gather");
    IN_PROGRESS
}

extern "C" fn error_string(_: c_int) -> *const c_char {
    c"remote process exited".as_ptr()
}

extern "C" fn last_error(_: Handle) -> *const c_char {
    c"the last error".as_ptr()
}

fn library() -> Arc<Nccl> {
    let calls = Calls {
        get_version,
        get_unique_id,
        comm_init_rank_config: init,
        comm_get_async_error: state,
        comm_abort: abort,
        comm_finalize: finalize,
        comm_destroy: destroy,
        all_gather,
        get_error_string: error_string,
        get_last_error: last_error,
    };
    Arc::new(Nccl { calls, version: OLDEST, place: "nowhere".to_owned() })
}

const LONG: Duration = Duration::from_secs(60);

fn join(states: &[c_int], deadline: Duration, is_aborted: bool) -> Result<Communicator, CudaError> {
    STATES.set(states.to_vec());
    let membership = Membership {
        id: [5; ID_BYTES],
        rank: 1,
        n_ranks: 2,
        connect_deadline: deadline,
        deadline,
        is_aborted: Box::new(move || is_aborted),
    };
    Communicator::join(&library(), membership)
}

fn joined() -> Communicator {
    join(&[IN_PROGRESS, IN_PROGRESS, SUCCESS], LONG, false).unwrap()
}

fn take_log() -> Vec<&'static str> {
    LOG.take()
}

fn gather(communicator: &mut Communicator) -> Result<(), CudaError> {
    communicator.all_gather(0x100, 0x200, 12, Stream::none())
}

#[test]
fn a_group_forms_gathers_and_parts() {
    let mut communicator = joined();
    assert_eq!((communicator.rank(), communicator.n_ranks()), (1, 2));
    STATES.set(vec![IN_PROGRESS, SUCCESS]);
    gather(&mut communicator).unwrap();
    let mut looks = 0;
    let mut is_done = || {
        looks += 1;
        Ok(looks == 1000)
    };
    communicator.watch(&mut is_done).unwrap();
    communicator.leave().unwrap();
    assert_eq!(take_log(), ["init", "all-gather", "finalize", "destroy"]);
}

#[test]
fn a_member_that_does_not_leave_in_peace_is_aborted() {
    drop(joined());
    assert_eq!(take_log(), ["init", "abort"]);
}

#[test]
fn whoever_waits_too_long_for_a_group_is_told_so() {
    let error = join(&[IN_PROGRESS], Duration::ZERO, false).err().unwrap();
    let call = "ncclCommInitRankConfig";
    assert_eq!(error, CudaError::Late { call, deadline: Duration::ZERO });
    let error = join(&[IN_PROGRESS], LONG, true).err().unwrap();
    assert_eq!(error, CudaError::Aborted { call });
    let error = join(&[IN_PROGRESS, BROKEN], LONG, false).err().unwrap();
    let problem = "remote process exited: the last error".to_owned();
    assert_eq!(error, CudaError::Device { call, problem });
    assert_eq!(take_log(), ["init", "abort", "init", "abort", "init", "abort"]);
}

#[test]
fn a_watched_stream_ends_with_its_peer_its_deadline_or_its_device() {
    let call = "waiting for the stream";
    let device = CudaError::Device { call: "cuStreamQuery", problem: "gone".to_owned() };
    let late = CudaError::Late { call, deadline: Duration::ZERO };
    let peer = CudaError::Device { call, problem: "remote process exited: the last error".to_owned() };
    for (states, deadline, answer, expected) in [
        (vec![SUCCESS], Duration::ZERO, Ok(false), late),
        (vec![SUCCESS, BROKEN], LONG, Ok(false), peer),
        (vec![SUCCESS], LONG, Err(device.clone()), device),
    ] {
        let mut communicator = joined();
        communicator.set_deadline(deadline);
        STATES.set(states);
        assert_eq!(communicator.watch(&mut || answer.clone()), Err(expected));
        assert_eq!(take_log(), ["init"]);
        // Nothing reaches the library any more, but that it has ended.
        assert!(matches!(gather(&mut communicator), Err(CudaError::Device { .. })));
        assert!(communicator.watch(&mut || Ok(true)).is_err());
        assert!(communicator.leave().is_err());
        assert_eq!(take_log(), ["abort"]);
    }
}

#[test]
fn an_operation_that_is_not_started_in_time_is_an_error() {
    let mut communicator = joined();
    communicator.set_deadline(Duration::ZERO);
    STATES.set(vec![IN_PROGRESS]);
    assert!(matches!(gather(&mut communicator), Err(CudaError::Late { call: "ncclAllGather", .. })));
    communicator.abort();
    drop(communicator);
    assert_eq!(take_log(), ["init", "all-gather", "abort"]);
}
