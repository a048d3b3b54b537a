//! How the loop forms its group, and forms it anew when it was lost. Steps and requests are not its matter.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use paceline_domain::Epoch;
use tokio::sync::mpsc;

use super::{Engine, Event};
use crate::{
    groups::GroupStatus,
    pool::PoolWish,
    router::GroupFacts,
    shard_group::{FormError, LoadReport, RankEvent, ShardGroup},
};

/// Waits between attempts to form a group.
const REFORM_DELAYS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

impl Engine {
    pub(super) fn form_group(&mut self) {
        self.last_epoch = Epoch(self.last_epoch.0 + 1);
        let (epoch, spec, events) = (self.last_epoch, self.spec.clone(), self.events.clone());
        let (delay, member) = (self.form_delay, self.member.clone());
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            let (rank_events, forwarded) = mpsc::channel(64);
            tokio::spawn(forward(forwarded, events.clone()));
            let (loading, reports) = mpsc::channel(64);
            let forming = ShardGroup::form(&spec, epoch, loading, rank_events);
            let outcome = while_telling(forming, reports, |(rank, done_bytes, total_bytes)| {
                member.tell(GroupStatus::Loading { rank, done_bytes, total_bytes });
            });
            let _ = events.send(Event::Formed(outcome.await)).await;
        });
    }

    pub(super) fn formed(&mut self, outcome: Result<ShardGroup, FormError>) {
        match outcome.and_then(|group| self.join_others(group)) {
            Ok(group) => self.begin(group),
            Err(error) => {
                tracing::warn!(group = self.member.group(), %error, "no group yet");
                self.member.tell(GroupStatus::Forming(Some(error.to_string())));
                self.form_delay = (self.form_delay * 2).clamp(REFORM_DELAYS.0, REFORM_DELAYS.1);
                self.move_away();
                self.form_group();
            }
        }
    }

    /// From now on requests may come, unless another group would give them other tokens.
    fn join_others(&self, group: ShardGroup) -> Result<ShardGroup, FormError> {
        let facts = GroupFacts { n_kv_blocks: group.n_kv_blocks, numerics: group.numerics() };
        self.member.up(facts).map_err(|other| FormError(vec![other.to_string()]))?;
        Ok(group)
    }

    fn begin(&mut self, group: ShardGroup) {
        for (rank, ready) in group.ranks.iter().enumerate() {
            tracing::info!(
                group = self.member.group(),
                rank,
                device = ready.isa,
                threads = ready.threads,
                weight_bytes = ready.weight_bytes,
                kv_bytes = ready.kv_bytes,
                saved_bytes = ready.saved_bytes,
                "rank ready"
            );
        }
        self.note_devices(group.device_numerics());
        self.form_delay = Duration::ZERO;
        let n_kv_blocks = group.n_kv_blocks;
        // Sequences are admitted by the size of the first pool, so a later group has no other.
        self.spec.pool = PoolWish::Exactly(n_kv_blocks);
        self.scheduler.begin_epoch(group.epoch(), n_kv_blocks);
        if group.copies_blocks() {
            self.scheduler.copy_blocks();
        }
        self.drafter.set_branches(group.copies_blocks());
        self.member.tell(GroupStatus::Ready {
            n_ranks: group.n_ranks(),
            n_kv_blocks,
            weight_bytes: group.ranks.iter().map(|ready| ready.weight_bytes).sum(),
            saved_bytes: group.ranks.iter().map(|ready| ready.saved_bytes).sum(),
        });
        self.metrics.group_formed();
        self.group = Some(group);
    }

    /// Requests wait for the next group, from their tokens; when it cannot be formed at once they go elsewhere.
    pub(super) fn lose_group(&mut self, problem: String) {
        self.group = None;
        self.in_flight.clear();
        self.drafter.group_lost();
        self.member.down();
        self.member.tell(GroupStatus::Forming(Some(problem)));
        self.form_delay = REFORM_DELAYS.0;
        self.form_group();
    }

    /// Says when the same tokens are no longer promised.
    fn note_devices(&mut self, device_numerics: Vec<u32>) {
        if self.device_numerics.as_ref().is_some_and(|before| *before != device_numerics) {
            tracing::warn!(
                "the group computes with other devices than before: streams go on, later tokens may differ from an \
                 undisturbed run"
            );
        }
        self.device_numerics = Some(device_numerics);
    }
}

/// Epochs only have to grow, also over restarts of this process: the time of day in milliseconds does.
pub(super) fn first_epoch() -> Epoch {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Epoch(since_1970.as_millis() as u64)
}

async fn forward(mut ranks: mpsc::Receiver<RankEvent>, events: mpsc::Sender<Event>) {
    while let Some(event) = ranks.recv().await {
        if events.send(Event::Rank(event)).await.is_err() {
            return;
        }
    }
}

/// What comes of forming a group, when all that it reports has been told: a report that is told later would say of a group
/// that is ready that it loads.
async fn while_telling<T>(
    forming: impl Future<Output = T>,
    mut reports: mpsc::Receiver<LoadReport>,
    mut tell: impl FnMut(LoadReport),
) -> T {
    let telling = async {
        while let Some(report) = reports.recv().await {
            tell(report);
        }
    };
    tokio::join!(forming, telling).0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn all_of_loading_is_told_before_the_group_is_there() {
        let (loading, reports) = mpsc::channel(8);
        let forming = async move {
            for done in 1..=3 {
                loading.send((0, done, 3)).await.expect("room");
            }
            "formed"
        };
        let mut told = Vec::new();
        let outcome = while_telling(forming, reports, |(_, done, _)| told.push(done)).await;
        assert_eq!((outcome, told), ("formed", vec![1, 2, 3]));
    }
}
