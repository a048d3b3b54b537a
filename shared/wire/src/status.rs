//! Error kinds to gRPC status. It decides codes and details, not wording.

use std::time::Duration;

use paceline_domain::ErrorKind;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The gRPC code of an error kind.
pub fn code(kind: ErrorKind) -> Code {
    match kind {
        ErrorKind::Invalid => Code::InvalidArgument,
        ErrorKind::Unfit => Code::FailedPrecondition,
        ErrorKind::Busy => Code::ResourceExhausted,
        ErrorKind::Unavailable => Code::Unavailable,
        ErrorKind::Bug => Code::Internal,
    }
}

/// A status with this kind's code.
pub fn status(kind: ErrorKind, message: impl Into<String>) -> Status {
    Status::new(code(kind), message)
}

/// INVALID_ARGUMENT that lists every field violation, in the message and as `BadRequest` details.
pub fn bad_request(violations: &[(String, String)]) -> Status {
    let message = violations.iter().map(|(_, problem)| problem.as_str()).collect::<Vec<_>>().join("; ");
    let mut details = ErrorDetails::new();
    for (field, problem) in violations {
        details.add_bad_request_violation(field, problem);
    }
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// RESOURCE_EXHAUSTED with `RetryInfo`.
pub fn busy(message: impl Into<String>, retry_after: Duration) -> Status {
    let details = ErrorDetails::with_retry_info(Some(retry_after));
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bad_request_carries_every_violation() {
        let status = bad_request(&[("a".into(), "a is bad".into()), ("b".into(), "b is worse".into())]);
        assert_eq!(status.code(), Code::InvalidArgument);
        assert_eq!(status.message(), "a is bad; b is worse");
        let details = status.get_details_bad_request().expect("details");
        assert_eq!(details.field_violations[1].field, "b");
    }

    #[test]
    fn busy_says_when_to_come_back() {
        let status = busy("full", Duration::from_millis(250));
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(
            status.get_details_retry_info().and_then(|info| info.retry_delay),
            Some(Duration::from_millis(250))
        );
    }
}
