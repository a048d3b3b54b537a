//! NCCL without a GPU: it is found and asked, or the error says where it was looked for. Nothing crashes, nothing hangs.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use paceline_cuda::nccl::{Communicator, ID_BYTES, Membership, Nccl, SETTING};
use paceline_cuda::{CudaError, Driver};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The library `tests/run --cuda` fetches.
fn library() -> Option<PathBuf> {
    let named = std::env::var_os(SETTING).map(PathBuf::from);
    if named.is_none() {
        println!("skipped: {SETTING} is not set");
    }
    named
}

fn problem(result: Result<Nccl, CudaError>) -> String {
    match result.map(|nccl| nccl.version()) {
        Err(CudaError::Nccl(problem)) => problem,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_library_that_is_not_there_is_an_error_that_names_every_place() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let named = problem(Nccl::load(Some(folder)));
    let expected = format!("looked for {}/libnccl.so.2 ({SETTING})", folder.display());
    assert!(named.starts_with(&expected) && named.contains("No such file"), "{named}");
    match Nccl::load(None) {
        Ok(nccl) => assert!(nccl.place().contains("dynamic linker"), "{}", nccl.place()),
        Err(error) => {
            let text = error.to_string();
            let places = ["libnccl.so.2 by the dynamic linker", SETTING, "LD_LIBRARY_PATH"];
            assert!(places.iter().all(|place| text.contains(place)), "{text}");
        }
    }
}

#[test]
fn another_library_is_an_error() {
    let libc = std::fs::read_to_string("/proc/self/maps").unwrap();
    let libc =
        libc.lines().find_map(|line| line.split_whitespace().last().filter(|it| it.contains("libc.so")));
    let problem = problem(Nccl::load(Some(Path::new(libc.unwrap()))));
    assert!(problem.contains("is no NCCL"), "{problem}");
}

#[test]
fn the_library_says_its_version_and_makes_ids_or_says_what_is_missing() {
    let Some(path) = library() else { return };
    let nccl = Nccl::load(Some(&path)).unwrap();
    assert!(nccl.version().starts_with("2."), "{}", nccl.version());
    assert!(nccl.place().contains("libnccl.so.2"), "{}", nccl.place());
    match nccl.unique_id() {
        Ok(id) => assert!(id != [0; ID_BYTES] && id != nccl.unique_id().unwrap()),
        Err(error) => assert_says(&error, "ncclGetUniqueId"),
    }
}

#[test]
fn joining_without_a_driver_is_an_error_and_with_one_succeeds() {
    let Some(path) = library() else { return };
    let nccl = Arc::new(Nccl::load(Some(&path)).unwrap());
    let Ok(id) = nccl.unique_id() else { return };
    let membership = Membership {
        id,
        rank: 0,
        n_ranks: 1,
        connect_deadline: Duration::from_secs(60),
        deadline: Duration::from_secs(60),
        is_aborted: Box::new(|| false),
    };
    let driver = Driver::open(0).inspect(|driver| driver.enter().unwrap());
    match Communicator::join(&nccl, membership) {
        Ok(communicator) => {
            assert!(driver.is_ok());
            communicator.leave().unwrap();
        }
        Err(error) => {
            assert!(driver.is_err(), "{error}");
            assert_says(&error, "ncclCommInitRankConfig");
        }
    }
}

#[track_caller]
fn assert_says(error: &CudaError, wanted: &str) {
    let CudaError::Device { call, problem } = error else { panic!("another kind of error: {error}") };
    assert!(*call == wanted && !problem.is_empty(), "{error}");
}

#[test]
fn waiting_for_a_rank_that_never_comes_ends_at_the_abort_flag() {
    let Some(path) = library() else { return };
    let nccl = Arc::new(Nccl::load(Some(&path)).unwrap());
    let Ok(id) = nccl.unique_id() else { return };
    let membership = Membership {
        id,
        rank: 0,
        n_ranks: 2,
        connect_deadline: Duration::from_secs(60),
        deadline: Duration::from_secs(60),
        is_aborted: Box::new(|| true),
    };
    let driver = Driver::open(0).inspect(|driver| driver.enter().unwrap());
    let error = Communicator::join(&nccl, membership).err().unwrap();
    match driver {
        Ok(_) => assert!(matches!(error, CudaError::Aborted { .. }), "{error}"),
        Err(_) => assert!(!matches!(error, CudaError::Late { .. }), "{error}"),
    }
}
