//! Joining a group: the choice of transport and `connect`. Who is in the group was decided by the coordinator.

use crate::collective::{AbortFlag, Collective};
use crate::endpoint::{Endpoint, PeerAddress};
use crate::error::CollectiveError;
use crate::handover;
use crate::solo::Solo;
use crate::tcp;
use paceline_domain::Epoch;
use std::fmt;
use std::time::Duration;

/// How the ranks of a group reach each other. All ranks must be told the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Transport {
    /// Shared memory when all ranks are on one host, else TCP.
    #[default]
    Auto,
    /// Shared memory; an error when ranks are on several hosts.
    SharedMemory,
    /// TCP even on one host.
    Tcp,
}

/// A group as one of its ranks sees it.
#[derive(Clone)]
pub struct GroupSpec {
    /// This rank.
    pub rank: usize,
    /// Life number of the group.
    pub epoch: Epoch,
    /// Addresses of all ranks in rank order, this one included.
    pub peers: Vec<PeerAddress>,
    /// Known to the ranks of the group only. It is never sent.
    pub secret: [u8; 32],
    /// How peers reach each other.
    pub transport: Transport,
    /// How long joining may take.
    pub connect_deadline: Duration,
    /// How long each operation may take.
    pub deadline: Duration,
    /// Watched by every wait.
    pub abort: AbortFlag,
}

impl fmt::Debug for GroupSpec {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("GroupSpec")
            .field("rank", &self.rank)
            .field("n_ranks", &self.peers.len())
            .field("epoch", &self.epoch)
            .field("transport", &self.transport)
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// Joins the group. Returns when this rank has met the peers it needs; all ranks must call it.
///
/// # Errors
/// A peer that does not come within `connect_deadline`, is in another epoch or lacks the secret; the abort flag.
pub fn connect(endpoint: Endpoint, spec: &GroupSpec) -> Result<Box<dyn Collective>, CollectiveError> {
    let n_ranks = spec.peers.len();
    if spec.peers.get(spec.rank) != Some(endpoint.address()) {
        return Err(CollectiveError::Group(format!(
            "this endpoint is not peer {} of the {n_ranks} that were named",
            spec.rank
        )));
    }
    let is_one_host = spec.peers.iter().all(|peer| peer.is_same_host(endpoint.address()));
    let (collective, transport): (Box<dyn Collective>, _) = match spec.transport {
        _ if n_ranks == 1 => (Box::new(Solo::new()), "solo"),
        Transport::SharedMemory if !is_one_host => {
            let reason = "shared memory was asked for, but the ranks are on several hosts".to_owned();
            return Err(CollectiveError::Group(reason));
        }
        Transport::Auto | Transport::SharedMemory if is_one_host => {
            (Box::new(handover::connect(&endpoint, spec)?), "shared memory")
        }
        _ => (Box::new(tcp::connect(&endpoint, spec)?), "TCP"),
    };
    tracing::info!(rank = spec.rank, n_ranks, epoch = spec.epoch.0, transport, "joined the group");
    Ok(collective)
}
