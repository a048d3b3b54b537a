//! All groups as the rest of the process sees them: the way into each loop, how each is doing, and the router they share.
//! It decides nothing.

use std::sync::{Arc, Mutex, MutexGuard};

use paceline_domain::{Digest, GenerateRequest, group::BLOCK_POSITIONS};
use tokio::sync::{mpsc, watch};

use crate::{
    engine::{Event, MAX_EVENTS},
    prefix::{PrefixKey, extend_keys},
    router::{GroupFacts, OtherNumerics, Router, Wanted},
};

/// What the rest of the process may know of a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum GroupStatus {
    /// Being formed; the text says what the last attempt met.
    Forming(Option<String>),
    /// Loading weights.
    Loading {
        /// Who.
        rank: usize,
        /// Bytes done.
        done_bytes: u64,
        /// Bytes in total.
        total_bytes: u64,
    },
    /// Executing plans.
    Ready {
        /// Number of ranks.
        n_ranks: usize,
        /// Blocks of the KV pool.
        n_kv_blocks: u32,
        /// Bytes of weights that the ranks hold.
        weight_bytes: u64,
        /// Bytes that quantization at load has saved them.
        saved_bytes: u64,
    },
}

impl GroupStatus {
    /// Whether it executes plans.
    pub fn is_ready(&self) -> bool {
        matches!(self, Self::Ready { .. })
    }
}

/// All groups.
#[derive(Clone, Debug)]
pub struct Groups {
    router: Arc<Mutex<Router>>,
    loops: Arc<[mpsc::Sender<Event>]>,
    status: watch::Receiver<Vec<GroupStatus>>,
    /// The model, for names of prefixes.
    model: Digest,
}

/// One group, for its loop.
#[derive(Clone, Debug)]
pub struct Member {
    group: usize,
    loops: Arc<[mpsc::Sender<Event>]>,
    router: Arc<Mutex<Router>>,
    status: watch::Sender<Vec<GroupStatus>>,
}

/// What a loop needs: who it is, and its inbox.
#[derive(Debug)]
pub struct Seat {
    /// Which group.
    pub member: Member,
    /// What happens.
    pub inbox: mpsc::Receiver<Event>,
}

/// Where a request was sent; dropping it ends its load there.
#[derive(Debug)]
pub struct Route {
    group: usize,
    wanted: Wanted,
    router: Arc<Mutex<Router>>,
}

impl Groups {
    /// Groups that are not formed yet, by their names for messages; and a seat for the loop of each.
    pub fn new(names: Vec<String>, model: Digest) -> (Self, Vec<Seat>) {
        let (sender, status) = watch::channel(vec![GroupStatus::Forming(None); names.len()]);
        let (loops, inboxes): (Vec<_>, Vec<_>) = names.iter().map(|_| mpsc::channel(MAX_EVENTS)).unzip();
        let (loops, router): (Arc<[_]>, _) = (loops.into(), Arc::new(Mutex::new(Router::new(names))));
        let seat = |(group, inbox)| {
            let (loops, router, status) = (loops.clone(), router.clone(), sender.clone());
            Seat { member: Member { group, loops, router, status }, inbox }
        };
        let seats = inboxes.into_iter().enumerate().map(seat).collect();
        (Self { router, loops, status, model }, seats)
    }

    /// How each is doing.
    pub fn status(&self) -> &watch::Receiver<Vec<GroupStatus>> {
        &self.status
    }

    /// As [`Router::largest_pool`].
    pub fn largest_pool(&self) -> Option<u32> {
        lock(&self.router).largest_pool()
    }

    /// Chooses the group of a request, which must fit the largest pool.
    pub fn route(&self, request: &GenerateRequest, tenant: &str) -> Route {
        let tokens = request.prompt.tokens();
        let mut keys = Vec::new();
        // With one group there is nothing to choose by them.
        if self.loops.len() > 1 {
            let root = PrefixKey::root(tenant, &self.model);
            extend_keys(&mut keys, root, tokens, tokens.len() / BLOCK_POSITIONS);
        }
        let wanted = Wanted {
            keys,
            n_prompt: tokens.len(),
            max_tokens: request.stop.max_tokens as usize,
            n_choices: request.n_choices as usize,
        };
        let group = lock(&self.router).route(&wanted).expect("invariant: it fits the largest pool");
        Route { group, wanted, router: self.router.clone() }
    }

    /// Tells the loop of a group what happened; whether there is a loop any more.
    pub async fn send(&self, group: usize, event: Event) -> bool {
        self.loops[group].send(event).await.is_ok()
    }

    /// Ends all loops.
    pub async fn stop(&self) {
        for group in 0..self.loops.len() {
            self.send(group, Event::Stop).await;
        }
    }
}

impl Member {
    /// Which group it is.
    pub fn group(&self) -> usize {
        self.group
    }

    /// The way into its loop.
    pub fn events(&self) -> &mpsc::Sender<Event> {
        &self.loops[self.group]
    }

    /// Tells other loops something, in order; who has ended misses it.
    pub fn tell_others(&self, events: Vec<(usize, Event)>) {
        let loops = self.loops.clone();
        tokio::spawn(async move {
            for (group, event) in events {
                let _ = loops[group].send(event).await;
            }
        });
    }

    /// Tells how it is doing.
    pub fn tell(&self, status: GroupStatus) {
        self.status.send_modify(|all| all[self.group] = status);
    }

    /// As [`Router::up`].
    ///
    /// # Errors
    /// As there.
    pub fn up(&self, facts: GroupFacts) -> Result<(), OtherNumerics> {
        lock(&self.router).up(self.group, facts)
    }

    /// As [`Router::down`].
    pub fn down(&self) {
        lock(&self.router).down(self.group);
    }
}

impl Route {
    /// Which group.
    pub fn group(&self) -> usize {
        self.group
    }

    /// Another group, where the request counts from now on: one that is up, for a request of one that is down.
    pub fn elsewhere(&mut self) -> Option<usize> {
        self.group = lock(&self.router).reroute(self.group, &self.wanted)?;
        Some(self.group)
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        lock(&self.router).ended(self.group, self.wanted.n_tokens());
    }
}

fn lock(router: &Mutex<Router>) -> MutexGuard<'_, Router> {
    router.lock().expect("invariant: no panic while the lock is held")
}
