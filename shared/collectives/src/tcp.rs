//! Ranks on several hosts: a full mesh of TCP streams, each message to every peer that needs it. It decides neither
//! who is in the group nor what the numbers mean.
//!
//! No socket ever blocks: one loop sends and receives on all of them as far as they go, so two ranks that send more
//! than the sockets hold cannot lock each other up. Idle, the loop spins for a while, then sleeps until a socket is
//! ready. Frames are authenticated, not encrypted: keep groups on a network of their own.

use crate::collective::{Collective, CollectiveStats, MAX_GATHER_BYTES, OpKind};
use crate::endpoint::Endpoint;
use crate::error::CollectiveError;
use crate::finish::FinishPlans;
use crate::frame::{Expected, FrameKey, Incoming, Message, Outgoing, ReceiveError, SendProgress};
use crate::group::GroupSpec;
use crate::hello::{Greeter, accept_all, is_pause, sleep_on};
use crate::solo::check_shapes;
use crate::wait::{Limits, SPINS_PER_LOOK, Watch, spin_time};
use paceline_domain::{Epoch, ReduceTree};
use rustix::event::{PollFd, PollFlags};
use std::io::ErrorKind;
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Tells this transport from others in a hello.
const TRANSPORT: u32 = 2;
/// Longest single attempt to connect, between two looks at the abort flag.
const CONNECT_ATTEMPT: Duration = Duration::from_millis(500);

/// A rank with a TCP stream to every peer.
pub struct Tcp {
    rank: usize,
    epoch: Epoch,
    key: FrameKey,
    peers: Vec<Peer>,
    /// Number of the last operation.
    sequence: u64,
    limits: Limits,
    stats: CollectiveStats,
    plans: FinishPlans,
    is_poisoned: bool,
}

/// One rank of the group; this rank itself has no stream.
struct Peer {
    stream: Option<TcpStream>,
    incoming: Incoming,
    sending: Option<SendProgress>,
    /// What is still to come.
    expected: Option<Expected>,
}

/// Which peers an operation talks to.
#[derive(Clone, Copy)]
struct Routes<'a> {
    sends_to: &'a dyn Fn(usize) -> bool,
    /// `None`: nothing comes from this rank; else the message's size if it is known.
    expects_from: &'a dyn Fn(usize) -> Option<Option<usize>>,
}

/// Meets all peers: connects to lower ranks, waits for higher ones.
pub(crate) fn connect(endpoint: &Endpoint, spec: &GroupSpec) -> Result<Tcp, CollectiveError> {
    let n_ranks = spec.peers.len();
    let own = endpoint.address();
    let n_local = spec.peers.iter().filter(|peer| peer.is_same_host(own)).count();
    let limits =
        Limits { deadline: spec.connect_deadline, abort: spec.abort.clone(), spin: spin_time(n_local) };
    let watch = limits.watch("joining the group");
    let greeter =
        Greeter { rank: spec.rank, n_ranks, epoch: spec.epoch, transport: TRANSPORT, secret: &spec.secret };
    let mut streams: Vec<Option<TcpStream>> = (0..n_ranks).map(|_| None).collect();
    for to in 0..spec.rank {
        let mut stream = dial(&spec.peers[to].tcp, to, &watch)?;
        // Without it the small messages of a hello wait for each other's acknowledgement.
        stream.set_nodelay(true).map_err(CollectiveError::io("configuring a TCP socket"))?;
        greeter.greet(&mut stream, to, &watch)?;
        streams[to] = Some(stream);
    }
    let higher = (spec.rank + 1..n_ranks).collect();
    for (rank, stream) in accept_all(&endpoint.tcp, &greeter, higher, &limits, &watch)? {
        streams[rank] = Some(stream);
    }
    let limits = Limits { deadline: spec.deadline, ..limits };
    Tcp::new(streams, spec.rank, spec.epoch, &spec.secret, limits)
}

/// Connects to a peer whose socket has been listening since before its address was known.
fn dial(address: &str, to: usize, watch: &Watch) -> Result<TcpStream, CollectiveError> {
    loop {
        let candidates =
            address.to_socket_addrs().map_err(CollectiveError::io("looking up a peer's host name"))?;
        for candidate in candidates {
            let nap = watch.nap(to)?.max(CONNECT_ATTEMPT);
            match TcpStream::connect_timeout(&candidate, nap) {
                Ok(stream) => return Ok(stream),
                Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Err(watch.left(to)),
                Err(error) => tracing::debug!(rank = to, %candidate, %error, "a peer cannot be reached yet"),
            }
        }
        std::thread::sleep(watch.nap(to)?);
    }
}

impl Tcp {
    fn new(
        streams: Vec<Option<TcpStream>>,
        rank: usize,
        epoch: Epoch,
        secret: &[u8; 32],
        limits: Limits,
    ) -> Result<Self, CollectiveError> {
        for stream in streams.iter().flatten() {
            let configured = stream.set_nodelay(true).and_then(|()| stream.set_nonblocking(true));
            configured.map_err(CollectiveError::io("configuring a TCP socket"))?;
        }
        let peer = |stream| Peer { stream, incoming: Incoming::default(), sending: None, expected: None };
        Ok(Self {
            rank,
            epoch,
            key: FrameKey::new(secret, epoch),
            peers: streams.into_iter().map(peer).collect(),
            sequence: 0,
            limits,
            stats: CollectiveStats::default(),
            plans: FinishPlans::default(),
            is_poisoned: false,
        })
    }

    /// Exchanges one message, unless an earlier operation failed. After a failure the streams are closed, so that
    /// peers see it.
    fn exchange(&mut self, kind: OpKind, payload: &[u8], routes: Routes<'_>) -> Result<(), CollectiveError> {
        if self.is_poisoned {
            return Err(CollectiveError::Poisoned);
        }
        self.sequence += 1;
        let own = Message { kind, from: self.rank, epoch: self.epoch, sequence: self.sequence };
        for (rank, peer) in self.peers.iter_mut().enumerate().filter(|(_, peer)| peer.stream.is_some()) {
            peer.incoming.begin();
            peer.sending = (routes.sends_to)(rank).then(SendProgress::default);
            peer.expected = (routes.expects_from)(rank)
                .map(|total| Expected { message: Message { from: rank, ..own }, total });
        }
        let watch = self.limits.watch(kind.name());
        let result = self.pump(own, payload, &watch);
        if result.is_err() {
            self.is_poisoned = true;
            for stream in self.peers.iter().filter_map(|peer| peer.stream.as_ref()) {
                // A stream that is already closed cannot be closed again; that is all that can fail.
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        result
    }

    /// Moves bytes until everything is sent and received.
    fn pump(&mut self, own: Message, payload: &[u8], watch: &Watch) -> Result<(), CollectiveError> {
        let mut outgoing = Outgoing::new(own, &self.key, payload);
        let mut idle_since: Option<Instant> = None;
        let mut n_idle = 0u32;
        loop {
            let mut n_moved = 0;
            for (rank, peer) in self.peers.iter_mut().enumerate() {
                let (n_sent, n_received) = peer.step(rank, &mut outgoing, &self.key, watch)?;
                self.stats.bytes_sent += n_sent as u64;
                n_moved += n_sent + n_received;
            }
            let waited_for = self.peers.iter().position(Peer::is_busy);
            if (n_moved > 0 || waited_for.is_none())
                && let Some(start) = idle_since.take()
            {
                self.stats.wait += start.elapsed();
                n_idle = 0;
            }
            let Some(rank) = waited_for else { return Ok(()) };
            if n_moved > 0 {
                continue;
            }
            let start = *idle_since.get_or_insert_with(Instant::now);
            n_idle += 1;
            // Each turn costs a system call or two, so a look at the clock is cheap beside it.
            if start.elapsed() < self.limits.spin {
                if n_idle.is_multiple_of(SPINS_PER_LOOK) {
                    watch.nap(rank)?;
                }
                continue;
            }
            let nap = watch.nap(rank)?;
            sleep_on(&mut self.peers.iter().filter_map(Peer::interest).collect::<Vec<_>>(), nap)?;
        }
    }
}

impl Peer {
    fn is_busy(&self) -> bool {
        self.sending.is_some() || self.expected.is_some()
    }

    /// What to sleep on.
    fn interest(&self) -> Option<PollFd<'_>> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::OUT, self.sending.is_some());
        flags.set(PollFlags::IN, self.expected.is_some());
        let stream = self.stream.as_ref().filter(|_| !flags.is_empty())?;
        Some(PollFd::new(stream, flags))
    }

    /// Sends and receives what can be now; returns how many bytes.
    fn step(
        &mut self,
        rank: usize,
        outgoing: &mut Outgoing<'_>,
        key: &FrameKey,
        watch: &Watch,
    ) -> Result<(usize, usize), CollectiveError> {
        let Some(stream) = self.stream.as_mut() else { return Ok((0, 0)) };
        let (mut n_sent, mut n_received) = (0, 0);
        if let Some(progress) = self.sending.as_mut() {
            match outgoing.send(stream, progress) {
                Ok(n) => n_sent = n,
                Err(error) if is_pause(&error) => {}
                Err(_) => return Err(watch.left(rank)),
            }
            if outgoing.is_sent(*progress) {
                self.sending = None;
            }
        }
        if let Some(expected) = &self.expected {
            match self.incoming.receive(stream, expected, key) {
                Ok(n) => n_received = n,
                Err(ReceiveError::Io(error)) if is_pause(&error) => {}
                Err(ReceiveError::Io(_)) => return Err(watch.left(rank)),
                Err(ReceiveError::Refused(error)) => return Err(error),
            }
            if self.incoming.is_done() {
                self.expected = None;
            }
        }
        Ok((n_sent, n_received))
    }
}

impl Collective for Tcp {
    fn rank(&self) -> usize {
        self.rank
    }

    fn n_ranks(&self) -> usize {
        self.peers.len()
    }

    fn all_reduce_tree(
        &mut self,
        tree: &ReduceTree,
        partials: &[f32],
        out: &mut [f32],
    ) -> Result<(), CollectiveError> {
        check_shapes(tree, self.rank, self.peers.len(), partials, out);
        let n = out.len();
        let n_bytes = |rank: usize| tree.subtrees(rank).len() * n * size_of::<f32>();
        let routes = Routes { sends_to: &|_| true, expects_from: &|rank| Some(Some(n_bytes(rank))) };
        self.exchange(OpKind::Reduce, bytemuck::cast_slice(partials), routes)?;
        let (own, peers) = (self.rank, &self.peers);
        let part = |rank: usize, subtree: usize| -> &[f32] {
            let all = if rank == own { partials } else { peers[rank].incoming.floats() };
            &all[subtree * n..][..n]
        };
        self.plans.run(tree, part, out);
        Ok(())
    }

    fn gather(&mut self, own: &[u8], parts: &mut Vec<Vec<u8>>) -> Result<(), CollectiveError> {
        assert!(own.len() <= MAX_GATHER_BYTES, "{} bytes are too many to gather", own.len());
        let is_root = self.rank == 0;
        let routes = Routes { sends_to: &|rank| rank == 0, expects_from: &|_| is_root.then_some(None) };
        self.exchange(OpKind::Gather, own, routes)?;
        parts.resize_with(if is_root { self.peers.len() } else { 0 }, Vec::new);
        for (rank, part) in parts.iter_mut().enumerate() {
            part.clear();
            part.extend_from_slice(if rank == 0 { own } else { self.peers[rank].incoming.bytes() });
        }
        Ok(())
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        let routes = Routes { sends_to: &|_| true, expects_from: &|_| Some(Some(0)) };
        self.exchange(OpKind::Barrier, &[], routes)
    }

    fn set_deadline(&mut self, deadline: Duration) {
        self.limits.deadline = deadline;
    }

    fn take_stats(&mut self) -> CollectiveStats {
        std::mem::take(&mut self.stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::AbortFlag;
    use std::net::TcpListener;

    fn pair(epochs: [u64; 2], secrets: [u8; 2]) -> [Tcp; 2] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        let limits =
            Limits { deadline: Duration::from_secs(60), abort: AbortFlag::new(), spin: Duration::ZERO };
        let of = |streams, rank: usize| {
            Tcp::new(streams, rank, Epoch(epochs[rank]), &[secrets[rank]; 32], limits.clone()).unwrap()
        };
        [of(vec![None, Some(near)], 0), of(vec![Some(far), None], 1)]
    }

    fn barriers(both: [Tcp; 2]) -> [Result<(), CollectiveError>; 2] {
        let [mut first, mut second] = both;
        std::thread::scope(|scope| {
            let far = scope.spawn(move || second.barrier());
            let near = first.barrier();
            assert_eq!(matches!(first.barrier(), Err(CollectiveError::Poisoned)), near.is_err());
            drop(first);
            [near, far.join().unwrap()]
        })
    }

    #[test]
    fn a_message_of_a_lower_epoch_is_refused() {
        let [near, _] = barriers(pair([8, 7], [1, 1]));
        assert!(matches!(near, Err(CollectiveError::Epoch { rank: 1, theirs: Epoch(7), ours: Epoch(8) })));
    }

    #[test]
    fn a_message_made_with_another_secret_is_refused() {
        let [near, _] = barriers(pair([8, 8], [1, 2]));
        assert!(matches!(near, Err(CollectiveError::Corrupt { rank: 1, .. })));
    }

    #[test]
    fn a_rank_that_does_something_else_is_named() {
        let [mut first, mut second] = pair([8, 8], [1, 1]);
        std::thread::scope(|scope| {
            scope.spawn(move || second.barrier());
            let error = first.gather(b"", &mut Vec::new()).unwrap_err();
            assert!(matches!(error, CollectiveError::Mismatch { rank: 1, .. }), "{error}");
            drop(first);
        });
    }
}
