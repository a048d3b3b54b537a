//! How two ranks meet: each proves that it knows the group's secret, without sending it, and that it means the same
//! group. It moves no data afterwards.
//!
//! The connecting rank sends who it is and a nonce; the accepting one answers with its nonce and a keyed hash of
//! both messages; the connecting one answers with its own keyed hash; the accepting one says yes. The hashes differ
//! by role, so neither can be reflected. A connection that fails is dropped and the accepting rank goes on
//! listening: a stranger or a rank of an earlier epoch must not keep a group from forming.

use crate::endpoint::random_bytes;
use crate::error::CollectiveError;
use crate::wait::{Limits, NAP, Watch};
use paceline_domain::Epoch;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

const MAGIC: [u8; 8] = *b"PLHELLO1";
/// A connection that does not finish its hello in this time is dropped.
const HELLO_DEADLINE: Duration = Duration::from_secs(2);

/// Magic, epoch, from, to, number of ranks, transport, nonce.
const HELLO_BYTES: usize = 8 + 8 + 4 * 4 + 32;
/// Verdict, epoch, nonce, proof.
const ANSWER_BYTES: usize = 8 + 8 + 32 + 32;

/// First field of an answer, and the last message.
const ACCEPTED: u64 = 0;
const WRONG_EPOCH: u64 = 1;
const WRONG_GROUP: u64 = 2;
const WRONG_PROOF: u64 = 3;

/// A connected stream.
pub(crate) trait Link: Read + Write + AsFd {
    fn set_read_wait(&self, wait: Option<Duration>) -> io::Result<()>;
}

impl Link for TcpStream {
    fn set_read_wait(&self, wait: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(wait)
    }
}

impl Link for UnixStream {
    fn set_read_wait(&self, wait: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(wait)
    }
}

/// A listening socket.
pub(crate) trait Listen: AsFd {
    type Link: Link;
    fn take(&self) -> io::Result<Self::Link>;
    fn never_block(&self) -> io::Result<()>;
}

impl Listen for TcpListener {
    type Link = TcpStream;
    fn take(&self) -> io::Result<TcpStream> {
        self.accept().map(|(stream, _)| stream)
    }
    fn never_block(&self) -> io::Result<()> {
        self.set_nonblocking(true)
    }
}

impl Listen for UnixListener {
    type Link = UnixStream;
    fn take(&self) -> io::Result<UnixStream> {
        self.accept().map(|(stream, _)| stream)
    }
    fn never_block(&self) -> io::Result<()> {
        self.set_nonblocking(true)
    }
}

/// Who this rank is, for peers it has not met.
#[derive(Debug)]
pub(crate) struct Greeter<'a> {
    pub(crate) rank: usize,
    pub(crate) n_ranks: usize,
    pub(crate) epoch: Epoch,
    /// Tells transports apart.
    pub(crate) transport: u32,
    pub(crate) secret: &'a [u8; 32],
}

impl Greeter<'_> {
    /// Says hello to rank `to` on a fresh connection.
    pub(crate) fn greet(
        &self,
        link: &mut impl Link,
        to: usize,
        watch: &Watch,
    ) -> Result<(), CollectiveError> {
        let hello = self.hello(to, random_bytes()?);
        send(link, &hello, to, watch)?;
        let answer: [u8; ANSWER_BYTES] = receive(link, to, watch)?;
        let theirs = Epoch(u64_at(&answer, 8));
        self.read_verdict(u64_at(&answer, 0), to, theirs)?;
        let proof = self.proof("accepting", &hello, &answer[..ANSWER_BYTES - 32]);
        if proof != answer[ANSWER_BYTES - 32..] {
            return Err(CollectiveError::Secret { rank: to });
        }
        let proof = self.proof("connecting", &hello, &answer);
        send(link, proof.as_bytes(), to, watch)?;
        let verdict: [u8; 8] = receive(link, to, watch)?;
        self.read_verdict(u64_at(&verdict, 0), to, theirs)
    }

    /// Takes the hello of one of the `expected` ranks; returns which.
    pub(crate) fn answer(
        &self,
        link: &mut impl Link,
        expected: &[usize],
        watch: &Watch,
    ) -> Result<usize, CollectiveError> {
        let hello: [u8; HELLO_BYTES] = receive(link, expected[0], watch)?;
        let rank = u32_at(&hello, 16) as usize;
        let theirs = Epoch(u64_at(&hello, 8));
        let mut same_group = self.hello(self.rank, [0; 32]);
        same_group[16..20].copy_from_slice(&hello[16..20]);
        let verdict = if hello[..8] == MAGIC && theirs != self.epoch {
            WRONG_EPOCH
        } else if hello[..HELLO_BYTES - 32] != same_group[..HELLO_BYTES - 32] || !expected.contains(&rank) {
            WRONG_GROUP
        } else {
            ACCEPTED
        };
        let mut answer = [0; ANSWER_BYTES];
        answer[..8].copy_from_slice(&verdict.to_le_bytes());
        answer[8..16].copy_from_slice(&self.epoch.0.to_le_bytes());
        answer[16..48].copy_from_slice(&random_bytes::<32>()?);
        if verdict == ACCEPTED {
            let proof = self.proof("accepting", &hello, &answer[..ANSWER_BYTES - 32]);
            answer[48..].copy_from_slice(proof.as_bytes());
        }
        send(link, &answer, rank, watch)?;
        self.read_verdict(verdict, rank, theirs)?;
        let proof: [u8; 32] = receive(link, rank, watch)?;
        let verdict = if self.proof("connecting", &hello, &answer) == proof { ACCEPTED } else { WRONG_PROOF };
        send(link, &verdict.to_le_bytes(), rank, watch)?;
        self.read_verdict(verdict, rank, theirs).map(|()| rank)
    }

    fn hello(&self, to: usize, nonce: [u8; 32]) -> [u8; HELLO_BYTES] {
        let mut hello = [0; HELLO_BYTES];
        hello[..8].copy_from_slice(&MAGIC);
        hello[8..16].copy_from_slice(&self.epoch.0.to_le_bytes());
        let words = [self.rank as u32, to as u32, self.n_ranks as u32, self.transport];
        for (i, word) in words.into_iter().enumerate() {
            hello[16 + 4 * i..][..4].copy_from_slice(&word.to_le_bytes());
        }
        hello[32..].copy_from_slice(&nonce);
        hello
    }

    /// Comparing the result takes the same time whatever differs.
    fn proof(&self, role: &str, hello: &[u8], answer: &[u8]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(self.secret);
        hasher.update(role.as_bytes()).update(hello).update(answer);
        hasher.finalize()
    }

    fn read_verdict(&self, verdict: u64, rank: usize, theirs: Epoch) -> Result<(), CollectiveError> {
        match verdict {
            ACCEPTED => Ok(()),
            WRONG_EPOCH => Err(CollectiveError::Epoch { rank, theirs, ours: self.epoch }),
            WRONG_PROOF => Err(CollectiveError::Secret { rank }),
            _ => {
                let what = format!("it is no rank of this group of {} to be met now", self.n_ranks);
                Err(CollectiveError::Mismatch { rank, what })
            }
        }
    }
}

/// Listens until each of the `expected` ranks has come.
pub(crate) fn accept_all<L: Listen>(
    listener: &L,
    greeter: &Greeter<'_>,
    mut expected: Vec<usize>,
    limits: &Limits,
    watch: &Watch,
) -> Result<Vec<(usize, L::Link)>, CollectiveError> {
    let mut met = Vec::new();
    listener.never_block().map_err(CollectiveError::io("listening for peers"))?;
    while let Some(first) = expected.first() {
        let nap = watch.nap(*first)?;
        let mut link = match listener.take() {
            Ok(link) => link,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                sleep_on(&mut [PollFd::new(listener, PollFlags::IN)], nap)?;
                continue;
            }
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {
                continue;
            }
            Err(error) => return Err(CollectiveError::io("accepting a peer")(error)),
        };
        let hello = Limits { deadline: HELLO_DEADLINE.min(limits.deadline), ..limits.clone() };
        match greeter.answer(&mut link, &expected, &hello.watch("hello")) {
            Ok(rank) => {
                expected.retain(|other| *other != rank);
                met.push((rank, link));
            }
            Err(error @ CollectiveError::Aborted { .. }) => return Err(error),
            Err(error) => {
                tracing::warn!(rank = greeter.rank, epoch = greeter.epoch.0, %error, "refused a peer")
            }
        }
    }
    Ok(met)
}

/// Sleeps until a socket is ready or the time is over.
pub(crate) fn sleep_on(sockets: &mut [PollFd<'_>], nap: Duration) -> Result<(), CollectiveError> {
    let nap = Timespec::try_from(nap).expect("invariant: a nap is short");
    match poll(sockets, Some(&nap)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(CollectiveError::os("waiting for sockets")(errno)),
    }
}

/// Hello messages fit the socket's buffer, so sending does not block.
pub(crate) fn send(
    link: &mut impl Link,
    bytes: &[u8],
    rank: usize,
    watch: &Watch,
) -> Result<(), CollectiveError> {
    link.write_all(bytes).map_err(|_| watch.left(rank))
}

fn receive<const N: usize>(
    link: &mut impl Link,
    rank: usize,
    watch: &Watch,
) -> Result<[u8; N], CollectiveError> {
    let mut bytes = [0; N];
    let mut n_read = 0;
    link.set_read_wait(Some(NAP)).map_err(CollectiveError::io("setting a read timeout"))?;
    while n_read < N {
        match link.read(&mut bytes[n_read..]) {
            Ok(0) => return Err(watch.left(rank)),
            Ok(n) => n_read += n,
            Err(error) if is_pause(&error) => {
                watch.nap(rank)?;
            }
            Err(_) => return Err(watch.left(rank)),
        }
    }
    Ok(bytes)
}

/// Nothing now, perhaps later.
pub(crate) fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[offset + i]))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[offset + i]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::AbortFlag;

    const BASE: Greeter<'static> =
        Greeter { rank: 0, n_ranks: 3, epoch: Epoch(5), transport: 1, secret: &[7; 32] };

    /// What both sides say when rank 0 (`BASE`) accepts `connecting`, who wants to meet rank `to`.
    fn meet(
        connecting: &Greeter<'static>,
        to: usize,
    ) -> (Result<(), CollectiveError>, Result<usize, CollectiveError>) {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let limits =
            Limits { deadline: Duration::from_secs(60), abort: AbortFlag::new(), spin: Duration::ZERO };
        std::thread::scope(|scope| {
            let accepting = scope.spawn(|| {
                let met = BASE.answer(&mut far, &[1, 2], &limits.watch("hello"));
                drop(far);
                met
            });
            let greeted = connecting.greet(&mut near, to, &limits.watch("hello"));
            drop(near);
            (greeted, accepting.join().unwrap())
        })
    }

    #[test]
    fn ranks_of_one_group_meet() {
        let (greeted, met) = meet(&Greeter { rank: 2, ..BASE }, 0);
        greeted.unwrap();
        assert_eq!(met.unwrap(), 2);
    }

    #[test]
    fn another_epoch_is_refused_with_both_numbers() {
        for epoch in [4, 6] {
            let (greeted, met) = meet(&Greeter { rank: 1, epoch: Epoch(epoch), ..BASE }, 0);
            let is_named = |error: &CollectiveError, expected: (usize, u64, u64)| {
                matches!(error, CollectiveError::Epoch { rank, theirs, ours }
                    if (*rank, theirs.0, ours.0) == expected)
            };
            assert!(is_named(&greeted.unwrap_err(), (0, 5, epoch)));
            assert!(is_named(&met.unwrap_err(), (1, epoch, 5)));
        }
    }

    #[test]
    fn another_secret_is_refused() {
        let (greeted, met) = meet(&Greeter { rank: 1, secret: &[8; 32], ..BASE }, 0);
        assert!(matches!(greeted.unwrap_err(), CollectiveError::Secret { rank: 0 }));
        assert!(matches!(met.unwrap_err(), CollectiveError::PeerLeft { rank: 1, .. }));
    }

    #[test]
    fn a_peer_that_makes_up_its_proof_is_refused() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let limits =
            Limits { deadline: Duration::from_secs(60), abort: AbortFlag::new(), spin: Duration::ZERO };
        let watch = limits.watch("hello");
        let verdict = std::thread::scope(|scope| {
            let accepting = scope.spawn(|| BASE.answer(&mut far, &[1], &limits.watch("hello")));
            let hello = Greeter { rank: 1, secret: &[0; 32], ..BASE }.hello(0, [1; 32]);
            send(&mut near, &hello, 0, &watch).unwrap();
            // The other side's own proof, sent back.
            let answer: [u8; ANSWER_BYTES] = receive(&mut near, 0, &watch).unwrap();
            send(&mut near, &answer[48..], 0, &watch).unwrap();
            let verdict: [u8; 8] = receive(&mut near, 0, &watch).unwrap();
            assert!(matches!(accepting.join().unwrap(), Err(CollectiveError::Secret { rank: 1 })));
            verdict
        });
        assert_eq!(u64_at(&verdict, 0), WRONG_PROOF);
    }

    #[test]
    fn another_group_is_refused() {
        for (connecting, to) in [
            (Greeter { rank: 1, n_ranks: 4, ..BASE }, 0),
            (Greeter { rank: 1, transport: 2, ..BASE }, 0),
            (Greeter { rank: 3, ..BASE }, 0),
            (Greeter { rank: 0, ..BASE }, 0),
            (Greeter { rank: 1, ..BASE }, 2),
        ] {
            let (greeted, met) = meet(&connecting, to);
            assert!(matches!(greeted.unwrap_err(), CollectiveError::Mismatch { .. }), "{connecting:?}");
            assert!(matches!(met.unwrap_err(), CollectiveError::Mismatch { .. }), "{connecting:?}");
        }
    }
}
