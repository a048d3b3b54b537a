//! How ranks of one host come to share memory: rank 0 makes the region and hands its descriptor to each peer over a
//! Unix socket, after a hello. What happens in the region is not its concern.

use crate::endpoint::{Endpoint, unix_address};
use crate::error::CollectiveError;
use crate::group::GroupSpec;
use crate::hello::{Greeter, accept_all, is_pause};
use crate::region::Region;
use crate::shared_memory::SharedMemory;
use crate::wait::{Limits, NAP, Watch, spin_time};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Tells this transport from others in a hello.
const TRANSPORT: u32 = 1;

/// Meets the peers and shares rank 0's region with them.
pub(crate) fn connect(endpoint: &Endpoint, spec: &GroupSpec) -> Result<SharedMemory, CollectiveError> {
    let n_ranks = spec.peers.len();
    let limits =
        Limits { deadline: spec.connect_deadline, abort: spec.abort.clone(), spin: spin_time(n_ranks) };
    let watch = limits.watch("joining the group");
    let greeter =
        Greeter { rank: spec.rank, n_ranks, epoch: spec.epoch, transport: TRANSPORT, secret: &spec.secret };
    let mut links: Vec<Option<UnixStream>> = (0..n_ranks).map(|_| None).collect();
    let region = if spec.rank == 0 {
        let (region, fd) = Region::create(n_ranks, spec.epoch)?;
        for (rank, link) in accept_all(&endpoint.unix, &greeter, (1..n_ranks).collect(), &limits, &watch)? {
            send_descriptor(&link, &fd).map_err(|_| watch.left(rank))?;
            links[rank] = Some(link);
        }
        region
    } else {
        let mut link =
            UnixStream::connect_addr(&unix_address(&spec.peers[0].unix_name)?).map_err(|_| watch.left(0))?;
        greeter.greet(&mut link, 0, &watch)?;
        let fd = receive_descriptor(&link, &watch)?;
        links[0] = Some(link);
        Region::attach(fd.as_fd(), n_ranks, spec.epoch)?
    };
    for link in links.iter().flatten() {
        link.set_nonblocking(true).map_err(CollectiveError::io("configuring a unix socket"))?;
    }
    let limits = Limits { deadline: spec.deadline, ..limits };
    Ok(SharedMemory::new(region, spec.rank, links, spec.epoch, limits))
}

fn send_descriptor(link: &UnixStream, fd: &OwnedFd) -> rustix::io::Result<()> {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(link, &[IoSlice::new(&[0])], &mut ancillary, SendFlags::NOSIGNAL).map(|_| ())
}

fn receive_descriptor(link: &UnixStream, watch: &Watch) -> Result<OwnedFd, CollectiveError> {
    link.set_read_timeout(Some(NAP)).map_err(CollectiveError::io("setting a read timeout"))?;
    loop {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let received =
            recvmsg(link, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC);
        match received.map_err(std::io::Error::from) {
            Ok(_) => {
                let descriptor = ancillary.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                    _ => None,
                });
                return descriptor.ok_or_else(|| watch.left(0));
            }
            Err(error) if is_pause(&error) => {
                watch.nap(0)?;
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Err(watch.left(0)),
            Err(error) => return Err(CollectiveError::io("receiving shared memory")(error)),
        }
    }
}
