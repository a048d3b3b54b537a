//! What the metadata of a request says of its caller: whose it is and until when it is wanted. It reads no body.

use std::time::{Duration, Instant};

use paceline_wire::status::bad_request;
use tonic::{Status, metadata::MetadataMap};

/// Metadata that says whose a request is. Tenants share places fairly and no cached prefixes.
const TENANT: &str = "x-tenant";
/// Longest name of a tenant, in bytes.
const MAX_TENANT_BYTES: usize = 128;
/// How gRPC sends a client's deadline: what is left of it, up to eight digits and a unit.
const TIMEOUT: &str = "grpc-timeout";

/// Whose request, and until when.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    /// Empty when the request does not say.
    pub tenant: String,
    /// Nobody wants an answer after this.
    pub deadline: Option<Instant>,
}

impl Caller {
    /// Of a request that arrived now.
    ///
    /// # Errors
    /// When metadata is malformed.
    pub fn of(metadata: &MetadataMap, now: Instant) -> Result<Self, Status> {
        let timeout = timeout(metadata)?;
        let deadline = timeout.and_then(|timeout| now.checked_add(timeout));
        Ok(Self { tenant: tenant(metadata)?, deadline })
    }
}

fn problem(key: &str, problem: &str) -> Status {
    bad_request(&[(key.into(), format!("metadata {key} {problem}"))])
}

fn tenant(metadata: &MetadataMap) -> Result<String, Status> {
    let Some(value) = metadata.get(TENANT) else { return Ok(String::new()) };
    match value.to_str() {
        Ok(name) if name.len() > MAX_TENANT_BYTES => {
            Err(problem(TENANT, &format!("has {} bytes; at most {MAX_TENANT_BYTES} are taken", name.len())))
        }
        Ok(name) => Ok(name.to_owned()),
        Err(_) => Err(problem(TENANT, "is not printable ASCII")),
    }
}

fn timeout(metadata: &MetadataMap) -> Result<Option<Duration>, Status> {
    let Some(value) = metadata.get(TIMEOUT) else { return Ok(None) };
    let timeout = value.to_str().ok().and_then(parse_timeout);
    timeout.map(Some).ok_or_else(|| problem(TIMEOUT, "is not up to eight digits and one of H, M, S, m, u, n"))
}

fn parse_timeout(text: &str) -> Option<Duration> {
    let (unit_at, unit) = text.char_indices().next_back()?;
    let digits = &text[..unit_at];
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    match unit {
        'H' => Some(Duration::from_secs(n * 3600)),
        'M' => Some(Duration::from_secs(n * 60)),
        'S' => Some(Duration::from_secs(n)),
        'm' => Some(Duration::from_millis(n)),
        'u' => Some(Duration::from_micros(n)),
        'n' => Some(Duration::from_nanos(n)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        let cases = [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("99999999S", Some(Duration::from_secs(99_999_999))),
            ("250m", Some(Duration::from_millis(250))),
            ("7u", Some(Duration::from_micros(7))),
            ("0n", Some(Duration::ZERO)),
            ("123456789S", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("1.5S", None),
            ("5x", None),
            ("5é", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_timeout(text), expected, "{text}");
        }
    }

    #[test]
    fn a_caller_may_say_nothing_and_nothing_wrong() {
        let now = Instant::now();
        let of = |key: &'static str, value: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert(key, value.parse().expect("a value"));
            Caller::of(&metadata, now).map_err(|status| status.code())
        };
        let nobody = Caller { tenant: String::new(), deadline: None };
        assert_eq!(Caller::of(&MetadataMap::new(), now).unwrap(), nobody);
        assert_eq!(of(TENANT, "a").unwrap(), Caller { tenant: "a".into(), ..nobody.clone() });
        let deadline = Some(now + Duration::from_secs(3));
        assert_eq!(of(TIMEOUT, "3S").unwrap(), Caller { deadline, ..nobody });
        assert_eq!(of(TIMEOUT, "soon"), Err(Code::InvalidArgument));
        assert_eq!(of(TENANT, &"x".repeat(129)), Err(Code::InvalidArgument));
    }
}
