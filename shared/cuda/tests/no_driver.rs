//! A machine without a GPU: errors that say why, no panic. Where there is a driver, it is opened instead.

use paceline_cuda::{CudaError, Driver, Runtime};

#[test]
fn a_missing_driver_is_an_error_that_says_so() {
    match Driver::count() {
        Ok(n_devices) => {
            let driver = Driver::open(0).expect("a driver that counts devices opens the first");
            assert!(n_devices > 0 && driver.n_multiprocessors() > 0, "{}", driver.name());
        }
        Err(error) => {
            let CudaError::Unavailable(problem) = &error else { panic!("another kind of error: {error}") };
            let reasons = ["libcuda.so.1", "cuInit", "no device", "too old"];
            assert!(reasons.iter().any(|reason| problem.contains(reason)), "{problem}");
            assert_eq!(Driver::open(0).err(), Some(error));
        }
    }
}

#[test]
fn a_device_that_does_not_exist_is_an_error() {
    let error = Driver::open(1_000).err().expect("nobody has so many");
    assert!(matches!(error, CudaError::Unavailable(_)), "{error}");
}
