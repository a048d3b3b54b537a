//! A rank's address, made before its group exists. It listens; it does not yet talk to anybody.

use crate::error::CollectiveError;
use std::fmt;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::str::FromStr;

/// First part of every address; the digit is the version of the hello messages.
const PREFIX: &str = "paceline1";

/// Where to listen.
#[derive(Clone, Debug)]
pub struct BindSpec {
    /// Host name or IP address to listen on for peers of other hosts.
    pub host: String,
    /// TCP port; 0 lets the system choose.
    pub port: u16,
    /// What peers call this host, when that is not `host` (a wildcard address, a name behind a service).
    pub advertised_host: Option<String>,
}

impl Default for BindSpec {
    fn default() -> Self {
        Self { host: "127.0.0.1".to_owned(), port: 0, advertised_host: None }
    }
}

/// Where a rank can be reached, as text that travels through the coordinator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerAddress {
    /// Equal for processes that can share memory: digest of boot id, network namespace and user.
    pub(crate) host_key: String,
    /// Abstract Unix socket.
    pub(crate) unix_name: String,
    /// `host:port`.
    pub(crate) tcp: String,
}

impl PeerAddress {
    /// Whether two processes can share memory: same boot of the same machine, network namespace and user.
    pub fn is_same_host(&self, other: &Self) -> bool {
        self.host_key == other.host_key
    }
}

impl fmt::Display for PeerAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{PREFIX}/{}/{}/{}", self.host_key, self.unix_name, self.tcp)
    }
}

impl FromStr for PeerAddress {
    type Err = CollectiveError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |reason| CollectiveError::Address { text: text.chars().take(200).collect(), reason };
        let is_hex = |part: &str| part.len() == 32 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        let parts: Vec<&str> = text.split('/').collect();
        let [prefix, host_key, unix_name, tcp] = parts[..] else {
            return Err(wrong("expected four parts separated by '/'"));
        };
        if prefix != PREFIX {
            return Err(wrong("expected it to begin with paceline1"));
        }
        if !is_hex(host_key) || !is_hex(unix_name) {
            return Err(wrong("expected 32 hex digits in the second and third part"));
        }
        let has_port =
            tcp.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        if !has_port || tcp.len() > 300 {
            return Err(wrong("expected host:port in the fourth part"));
        }
        let [host_key, unix_name, tcp] = [host_key, unix_name, tcp].map(str::to_owned);
        Ok(Self { host_key, unix_name, tcp })
    }
}

/// Listens for the peers of one group that is yet to be formed. Used once.
#[derive(Debug)]
pub struct Endpoint {
    pub(crate) address: PeerAddress,
    pub(crate) unix: UnixListener,
    pub(crate) tcp: TcpListener,
}

impl Endpoint {
    /// Listens on a fresh Unix socket name and on TCP.
    ///
    /// # Errors
    /// When the system refuses one of the two.
    pub fn bind(spec: &BindSpec) -> Result<Self, CollectiveError> {
        let unix_name = hex(&random_bytes::<16>()?);
        let unix_address = unix_address(&unix_name)?;
        let unix =
            UnixListener::bind_addr(&unix_address).map_err(CollectiveError::io("binding a unix socket"))?;
        let tcp = TcpListener::bind((spec.host.as_str(), spec.port))
            .map_err(CollectiveError::io("binding a TCP socket for collectives"))?;
        let bound = tcp.local_addr().map_err(CollectiveError::io("asking for a bound TCP address"))?;
        let tcp_text = match &spec.advertised_host {
            Some(host) if host.contains(':') && !host.starts_with('[') => {
                format!("[{host}]:{}", bound.port())
            }
            Some(host) => format!("{host}:{}", bound.port()),
            None => bound.to_string(),
        };
        let address = PeerAddress { host_key: host_key()?, unix_name, tcp: tcp_text };
        Ok(Self { address, unix, tcp })
    }

    /// Where peers reach this rank.
    pub fn address(&self) -> &PeerAddress {
        &self.address
    }
}

pub(crate) fn unix_address(name: &str) -> Result<SocketAddr, CollectiveError> {
    SocketAddr::from_abstract_name(format!("paceline-{name}"))
        .map_err(CollectiveError::io("making a unix socket address"))
}

pub(crate) fn random_bytes<const N: usize>() -> Result<[u8; N], CollectiveError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)
        .map_err(|error| CollectiveError::Io { during: "drawing random bytes", source: error.into() })?;
    Ok(bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Processes with the same key see the same abstract sockets and may map each other's memory.
fn host_key() -> Result<String, CollectiveError> {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_err(CollectiveError::io("reading the boot id"))?;
    let namespace = std::fs::metadata("/proc/self/ns/net")
        .map_err(CollectiveError::io("looking up the network namespace"))?;
    let user = rustix::process::geteuid().as_raw();
    let text = format!("{}/{}/{}/{user}", boot_id.trim(), namespace.dev(), namespace.ino());
    Ok(hex(&blake3::derive_key("paceline collectives host key", text.as_bytes())[..16]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_survives_its_text() {
        let endpoint = Endpoint::bind(&BindSpec::default()).unwrap();
        let text = endpoint.address().to_string();
        let back: PeerAddress = text.parse().unwrap();
        assert_eq!(&back, endpoint.address(), "{text}");
        assert!(text.contains("127.0.0.1:"));
    }

    #[test]
    fn an_advertised_host_replaces_the_bound_one() {
        let of = |host: &str| {
            let spec = BindSpec { advertised_host: Some(host.to_owned()), ..BindSpec::default() };
            Endpoint::bind(&spec).unwrap().address().to_string()
        };
        assert!(of("shard-3.shards").contains("/shard-3.shards:"));
        assert!(of("::1").contains("/[::1]:"));
        assert!(of("::1").parse::<PeerAddress>().is_ok());
    }

    #[test]
    fn two_endpoints_of_a_process_share_a_host_and_nothing_else() {
        let [a, b] = [0, 1].map(|_| Endpoint::bind(&BindSpec::default()).unwrap());
        assert!(a.address().is_same_host(b.address()));
        assert_ne!(a.address().unix_name, b.address().unix_name);
        assert_ne!(a.address().tcp, b.address().tcp);
    }

    #[test]
    fn what_is_not_an_address_is_refused() {
        let key = "0123456789abcdef0123456789abcdef";
        for text in [
            String::new(),
            "paceline1".to_owned(),
            format!("paceline2/{key}/{key}/h:1"),
            format!("paceline1/{key}/{key}/h"),
            format!("paceline1/{key}/{key}/:1"),
            format!("paceline1/{key}/{key}/h:65536"),
            format!("paceline1/{key}x/{key}/h:1"),
            format!("paceline1/{key}/../h:1"),
            format!("paceline1/{key}/{key}/h:1/more"),
        ] {
            let error = text.parse::<PeerAddress>().unwrap_err();
            assert!(matches!(error, CollectiveError::Address { .. }), "{text}: {error}");
        }
    }
}
