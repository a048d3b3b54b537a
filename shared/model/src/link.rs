//! Whether the devices of a group reach each other without the host: every rank says what it has, the first decides, all
//! are told. Nothing but that is sent here.

use std::fmt;
use std::time::Duration;

use paceline_collectives::{AbortFlag, Collective, CollectiveError};

/// Bytes of the id that devices find each other with.
pub const LINK_ID_BYTES: usize = 128;
/// Bytes of a reason; longer ones are cut.
const REASON_BYTES: usize = 240;
/// A decision: whether, then an id or the bytes of a reason.
const DECISION_BYTES: usize = 1 + if REASON_BYTES > LINK_ID_BYTES { REASON_BYTES } else { LINK_ID_BYTES };

/// The id that devices find each other with; made by the first rank, used once.
pub type LinkId = [u8; LINK_ID_BYTES];

/// The id to join with, or why there are no links.
pub type Decision = Result<LinkId, String>;

/// The group a backend joins.
pub struct Group<'a> {
    /// The ranks, by way of their hosts.
    pub collective: &'a mut dyn Collective,
    /// How long devices may take to find each other.
    pub connect_deadline: Duration,
    /// How long each operation between devices may take.
    pub deadline: Duration,
    /// Watched by every wait.
    pub abort: AbortFlag,
}

/// What a rank's device brings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Tells devices apart, on all hosts.
    pub device: [u8; 16],
    /// What links them, with its version: "NCCL 2.28.9". All must have the same.
    pub library: String,
}

/// How sums over ranks are made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Route {
    /// There is one rank.
    Alone,
    /// From device to device, by this library.
    Direct(String),
    /// Through the hosts' collective, for this reason.
    ThroughHost(String),
}

impl fmt::Display for Route {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Alone => formatter.write_str("alone"),
            Self::Direct(library) => write!(formatter, "from device to device by {library}"),
            Self::ThroughHost(reason) => write!(formatter, "through the host: {reason}"),
        }
    }
}

impl Group<'_> {
    /// Every rank calls it with its offer, or why it has none. All get the same answer: the id to join with, made by
    /// `make_id` on the first rank, or why there are no links.
    ///
    /// # Errors
    /// When the collective fails.
    pub fn agree(
        &mut self,
        own: Result<Offer, String>,
        make_id: &mut dyn FnMut() -> Decision,
    ) -> Result<Decision, CollectiveError> {
        let own = match own {
            Ok(Offer { device, library }) => [&[1][..], &device, library.as_bytes()].concat(),
            Err(reason) => [&[0], reason.as_bytes()].concat(),
        };
        self.decide(&own, &mut |offers| {
            check(offers)?;
            make_id().map_err(|reason| format!("rank 0: {reason}"))
        })
    }

    /// Every rank calls it when it has joined, or could not. All get the same answer: one that failed is enough.
    ///
    /// # Errors
    /// When the collective fails.
    pub fn confirm(&mut self, joined: Result<(), String>) -> Result<Result<(), String>, CollectiveError> {
        let own = joined.err().unwrap_or_default();
        let decision = self.decide(own.as_bytes(), &mut |problems| match problems
            .iter()
            .position(|problem| !problem.is_empty())
        {
            Some(rank) => Err(format!("rank {rank}: {}", String::from_utf8_lossy(&problems[rank]))),
            None => Ok([0; LINK_ID_BYTES]),
        });
        Ok(decision?.map(|_| ()))
    }

    fn decide(
        &mut self,
        own: &[u8],
        decide: &mut dyn FnMut(&[Vec<u8>]) -> Decision,
    ) -> Result<Decision, CollectiveError> {
        let (mut parts, mut decision) = (Vec::new(), [0; DECISION_BYTES]);
        self.collective.gather(own, &mut parts)?;
        if self.collective.rank() == 0 {
            match decide(&parts) {
                Ok(id) => {
                    decision[0] = 1;
                    decision[1..1 + LINK_ID_BYTES].copy_from_slice(&id);
                }
                Err(reason) => {
                    let reason = &reason[..reason.floor_char_boundary(REASON_BYTES)];
                    decision[1..1 + reason.len()].copy_from_slice(reason.as_bytes());
                }
            }
        }
        self.collective.broadcast_from_first(&mut decision)?;
        Ok(match decision {
            [1, rest @ ..] => Ok(*rest.first_chunk().expect("invariant: a decision has room for an id")),
            [_, rest @ ..] => Err(String::from_utf8_lossy(&rest).trim_end_matches('\0').to_owned()),
        })
    }
}

/// Whether all ranks have a device of their own and the same library.
fn check(offers: &[Vec<u8>]) -> Result<(), String> {
    let mut seen: Vec<(&[u8], &[u8])> = Vec::new();
    for (rank, offer) in offers.iter().enumerate() {
        let (device, library) = match offer.as_slice() {
            [1, rest @ ..] if rest.len() >= 16 => rest.split_at(16),
            [_, reason @ ..] => return Err(format!("rank {rank}: {}", String::from_utf8_lossy(reason))),
            [] => return Err(format!("rank {rank} says nothing")),
        };
        if let Some(other) = seen.iter().position(|other| other.0 == device) {
            return Err(format!("ranks {other} and {rank} are on one device"));
        }
        if let Some(other) = seen.iter().position(|other| other.1 != library) {
            let [theirs, own] = [seen[other].1, library].map(String::from_utf8_lossy);
            return Err(format!("rank {other} has {theirs}, rank {rank} has {own}"));
        }
        seen.push((device, library));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(device: u8, library: &str) -> Vec<u8> {
        [&[1][..], &[device; 16], library.as_bytes()].concat()
    }

    fn refused(offers: &[Vec<u8>]) -> String {
        check(offers).expect_err("must be refused")
    }

    #[test]
    fn devices_of_their_own_with_one_library_are_linked() {
        assert_eq!(check(&[offered(1, "N 2"), offered(2, "N 2"), offered(3, "N 2")]), Ok(()));
        assert_eq!(check(&[offered(1, "")]), Ok(()));
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        let good = || offered(1, "N 2");
        assert_eq!(refused(&[good(), offered(2, "N 2"), good()]), "ranks 0 and 2 are on one device");
        assert_eq!(refused(&[good(), offered(2, "N 3")]), "rank 0 has N 2, rank 1 has N 3");
        assert_eq!(refused(&[good(), b"\0it is a CPU".to_vec()]), "rank 1: it is a CPU");
        assert_eq!(refused(&[vec![], good()]), "rank 0 says nothing");
        assert!(refused(&[vec![1, 2, 3]]).starts_with("rank 0"));
    }

    fn solo<T>(run: impl FnOnce(&mut Group<'_>) -> T) -> T {
        let collective = &mut paceline_collectives::Solo::new();
        let (connect_deadline, deadline) = (Duration::ZERO, Duration::ZERO);
        run(&mut Group { collective, connect_deadline, deadline, abort: AbortFlag::new() })
    }

    #[test]
    fn ids_and_reasons_arrive_as_they_were_sent() {
        let id: LinkId = std::array::from_fn(|i| i as u8 ^ 0xa5);
        let offer = || Ok(Offer { device: [0; 16], library: String::new() });
        solo(|group| {
            assert_eq!(group.agree(offer(), &mut || Ok(id)).expect("agrees"), Ok(id));
            let found = group.agree(offer(), &mut || Err("no id".into())).expect("agrees");
            assert_eq!(found, Err("rank 0: no id".into()));
            assert_eq!(group.confirm(Ok(())).expect("agrees"), Ok(()));
            assert_eq!(group.confirm(Err("lost".into())).expect("agrees"), Err("rank 0: lost".into()));
            // A long reason is cut between two characters.
            let cut =
                group.agree(Err("é".repeat(200)), &mut || Ok(id)).expect("agrees").expect_err("a reason");
            assert!(cut.len() >= REASON_BYTES - 1 && cut.ends_with('é'), "{cut}");
        });
    }
}
