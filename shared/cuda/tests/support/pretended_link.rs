//! What pretends to be NCCL between emulated devices: ranks are threads of one process, and a table holds what each of them
//! brings to a gather. It can be told to fail where the real one may.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use paceline_cuda::CudaError;
use paceline_cuda::runtime::Membership;
use paceline_model::link::{LINK_ID_BYTES, LinkId, Offer};

const ID: LinkId = [0x5e; LINK_ID_BYTES];

/// Between the devices of one group.
#[derive(Default)]
pub struct Wire {
    table: Mutex<Table>,
    changed: Condvar,
    n_gathers: AtomicUsize,
    n_captured: AtomicUsize,
}

#[derive(Default)]
struct Table {
    shown: Vec<Option<Vec<u8>>>,
    n_taken: usize,
}

/// One device's end.
pub struct PretendedLink {
    wire: Arc<Wire>,
    offer: Offer,
    can_join: bool,
    membership: Option<Membership>,
}

impl Wire {
    /// Gathers asked for by all ranks, and those of them that were captured.
    pub fn n_gathers(&self) -> (usize, usize) {
        (self.n_gathers.load(Ordering::Relaxed), self.n_captured.load(Ordering::Relaxed))
    }

    fn wait(
        &self,
        membership: &Membership,
        is_ready: &mut dyn FnMut(&mut Table) -> bool,
    ) -> Result<(), CudaError> {
        let (call, start) = ("a pretended gather", Instant::now());
        let mut table = self.table.lock().expect("lock");
        while !is_ready(&mut table) {
            if (membership.is_aborted)() {
                return Err(CudaError::Aborted { call });
            }
            if start.elapsed() > membership.deadline {
                return Err(CudaError::Late { call, deadline: membership.deadline });
            }
            table = self.changed.wait_timeout(table, Duration::from_millis(5)).expect("lock").0;
        }
        self.changed.notify_all();
        Ok(())
    }
}

impl PretendedLink {
    pub fn new(wire: &Arc<Wire>, device: u8) -> Self {
        let offer = Offer { device: [device; 16], library: "pretended 1".into() };
        Self { wire: Arc::clone(wire), offer, can_join: true, membership: None }
    }

    /// One that finds out late that it cannot.
    pub fn broken(self) -> Self {
        Self { can_join: false, ..self }
    }

    pub fn offer(&self) -> Result<Offer, CudaError> {
        Ok(self.offer.clone())
    }

    pub fn id(&self) -> Result<LinkId, CudaError> {
        Ok(ID)
    }

    pub fn join(&mut self, membership: Membership) -> Result<(), CudaError> {
        assert_eq!(membership.id, ID);
        if !self.can_join {
            return Err(CudaError::Nccl("pretended: no way to the peers".into()));
        }
        self.wire.table.lock().expect("lock").shown.resize(membership.n_ranks, None);
        self.membership = Some(membership);
        Ok(())
    }

    pub fn part(&mut self) {
        self.membership = None;
    }

    pub fn note(&self, is_capturing: bool) {
        self.wire.n_gathers.fetch_add(1, Ordering::Relaxed);
        self.wire.n_captured.fetch_add(usize::from(is_capturing), Ordering::Relaxed);
    }

    /// What all ranks bring, one after the other.
    pub fn all_gather(&mut self, own: Vec<u8>) -> Result<Vec<u8>, CudaError> {
        let ended = || CudaError::Nccl("pretended: not joined".into());
        let membership = self.membership.as_ref().ok_or_else(ended)?;
        let (rank, n_bytes, mut own) = (membership.rank, own.len(), Some(own));
        self.wire.wait(membership, &mut |table| {
            let is_free = table.shown[rank].is_none();
            if is_free {
                table.shown[rank] = own.take();
            }
            is_free
        })?;
        let mut all = Vec::new();
        self.wire.wait(membership, &mut |table| {
            let is_full = table.shown.iter().all(Option::is_some);
            if is_full {
                all = table.shown.iter().flatten().flatten().copied().collect();
                table.n_taken += 1;
                if table.n_taken == table.shown.len() {
                    table.n_taken = 0;
                    table.shown.fill(None);
                }
            }
            is_full
        })?;
        assert_eq!(all.len(), membership.n_ranks * n_bytes, "ranks gather as many bytes");
        Ok(all)
    }
}
