//! A whole cluster as child processes of this one: the shards of one or several groups, a coordinator, and a draft service
//! where one is wanted. It starts, watches and stops them; shards and draft that end are started again. What they do is their
//! own matter.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    future::poll_fn,
    path::PathBuf,
    task::Poll,
    time::Duration,
};

use anyhow::{Context as _, bail};
use paceline_shard::device::DeviceChoice;
use tokio::time::timeout;

use crate::{
    event::Event,
    process::{Log, ServiceEnded, ServiceProcess, ServiceSpec},
    progress::{Bar, Progress, megabytes},
    supervisor::{Need, Supervised},
};

/// How long a child may take until it listens.
const LISTEN_DEADLINE: Duration = Duration::from_secs(60);
/// Where shards and draft listen at first: on any free port, which is theirs from then on.
const ANY_PORT: &str = "127.0.0.1:0";
/// How long a child may take to end when asked.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// What to start.
#[derive(Clone, Debug)]
pub struct ClusterSpec {
    /// The executable with the `shard` and `coordinator` subcommands.
    pub program: PathBuf,
    /// Model file or directory.
    pub model: PathBuf,
    /// Name to serve it under.
    pub model_name: String,
    /// Where the coordinator listens.
    pub listen: String,
    /// Groups that each have the whole model.
    pub n_groups: usize,
    /// Compute threads of each rank, group by group; its length is the number of shards.
    pub threads: Vec<usize>,
    /// What each rank computes with, group by group; empty leaves it to the shards.
    pub devices: Vec<DeviceChoice>,
    /// Further arguments of every shard.
    pub shard_args: Vec<OsString>,
    /// Further arguments of the coordinator.
    pub coordinator_args: Vec<OsString>,
    /// A draft service beside them.
    pub draft: Option<DraftSpec>,
    /// Variables added to every child's environment.
    pub env: Vec<(String, String)>,
    /// What to do with the children's logs.
    pub log: Log,
}

impl ClusterSpec {
    /// Shards of each group.
    pub fn n_ranks(&self) -> usize {
        self.threads.len() / self.n_groups
    }

    /// What a shard is called; the group is named where there are several.
    pub fn shard_name(&self, shard: usize) -> String {
        let (group, rank) = (shard / self.n_ranks(), shard % self.n_ranks());
        if self.n_groups == 1 { format!("shard {rank}") } else { format!("group {group} shard {rank}") }
    }

    fn shard_service(&self, shard: usize, listen: &str) -> ServiceSpec {
        let mut args: Vec<OsString> = vec!["shard".into(), "--listen".into(), listen.into()];
        args.extend(["--model".into(), self.model.clone().into()]);
        args.extend(["--threads".into(), self.threads[shard].to_string().into()]);
        if let Some(device) = self.devices.get(shard) {
            args.extend(["--device".into(), device.to_string().into()]);
        }
        args.extend(self.shard_args.iter().cloned());
        self.service(self.shard_name(shard), args)
    }

    fn draft_service(&self, draft: &DraftSpec, listen: &str) -> ServiceSpec {
        let mut args: Vec<OsString> = vec!["draft".into(), "--listen".into(), listen.into()];
        args.extend(["--model".into(), draft.model.clone().into()]);
        args.extend(draft.args.iter().cloned());
        self.service("draft".into(), args)
    }

    fn coordinator_service(&self, shards: &[String], draft: Option<String>) -> ServiceSpec {
        let mut args: Vec<OsString> =
            vec!["coordinator".into(), "--listen".into(), self.listen.clone().into()];
        args.extend(["--model".into(), self.model.clone().into()]);
        args.extend(["--model-name".into(), self.model_name.clone().into()]);
        for group in shards.chunks(self.n_ranks()) {
            args.extend(["--shards".into(), group.join(",").into()]);
        }
        if let Some(draft) = draft {
            args.extend(["--draft".into(), draft.into()]);
            // On one machine they are faster one after the other, unless somebody knows better.
            if !self.coordinator_args.iter().any(|argument| argument == "--draft-placement") {
                args.extend(["--draft-placement".into(), "together".into()]);
            }
        }
        args.extend(self.coordinator_args.iter().cloned());
        self.service("coordinator".into(), args)
    }

    fn service(&self, name: String, args: Vec<OsString>) -> ServiceSpec {
        ServiceSpec { name, program: self.program.clone(), args, env: self.env.clone(), log: self.log }
    }
}

/// A draft service to start.
#[derive(Clone, Debug)]
pub struct DraftSpec {
    /// Model file or directory.
    pub model: PathBuf,
    /// Further arguments.
    pub args: Vec<OsString>,
}

/// A running cluster. Dropped, its processes are killed.
#[derive(Debug)]
pub struct Cluster {
    shards: Vec<Supervised>,
    shard_addresses: Vec<String>,
    coordinator: ServiceProcess,
    draft: Option<Supervised>,
    draft_address: Option<String>,
    address: String,
    http: Option<String>,
}

impl Cluster {
    /// Starts shards, then the coordinator, and returns when the group can execute steps.
    ///
    /// # Errors
    /// When a child cannot be started, ends early, or does not listen in time.
    pub async fn start(spec: &ClusterSpec, progress: &Progress) -> anyhow::Result<Self> {
        let mut shards: Vec<ServiceProcess> = (0..spec.threads.len())
            .map(|shard| Ok(ServiceProcess::start(&spec.shard_service(shard, ANY_PORT))?))
            .collect::<anyhow::Result<_>>()?;
        let mut shards_at = Vec::new();
        for shard in &mut shards {
            shards_at.push(listening(shard).await?);
        }
        let (mut draft, mut draft_address) = (None, None);
        if let Some(of_draft) = &spec.draft {
            let mut process = ServiceProcess::start(&spec.draft_service(of_draft, ANY_PORT))?;
            let address = listening(&mut process).await?;
            let again = spec.draft_service(of_draft, &address);
            draft = Some(Supervised::new(process, again, Need::Advice));
            draft_address = Some(address);
        }
        let url = |address: &String| format!("http://{address}");
        let shard_addresses: Vec<String> = shards_at.iter().map(url).collect();
        let draft_url = draft_address.as_ref().map(url);
        let mut coordinator = ServiceProcess::start(&spec.coordinator_service(&shard_addresses, draft_url))?;
        let (address, http) = {
            let ready = ready(&mut coordinator, spec, progress);
            tokio::select! {
                addresses = ready => addresses?,
                // One that cannot even begin is explained, not started again.
                ended = first(shards.iter_mut().map(ServiceProcess::ended)) => return Err(ended.into()),
            }
        };
        let supervised = |((shard, process), address): ((usize, ServiceProcess), &String)| {
            Supervised::new(process, spec.shard_service(shard, address), Need::Needed)
        };
        let shards = shards.into_iter().enumerate().zip(&shards_at).map(supervised).collect();
        Ok(Self { shards, shard_addresses, coordinator, draft, draft_address, address, http })
    }

    /// Where clients reach the coordinator, as a URL.
    pub fn address(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The coordinator's HTTP port, as `host:port`, where it has one.
    pub fn http(&self) -> Option<&str> {
        self.http.as_deref()
    }

    /// Where the coordinator reaches the shards, as URLs in rank order, group by group.
    pub fn shard_addresses(&self) -> &[String] {
        &self.shard_addresses
    }

    /// The draft service, to look at or to harm; it may have ended.
    pub fn draft(&mut self) -> Option<&mut ServiceProcess> {
        self.draft.as_mut().map(Supervised::process)
    }

    /// Where the draft service listens, as `host:port`.
    pub fn draft_address(&self) -> Option<&str> {
        self.draft_address.as_deref()
    }

    /// Every process that the cluster cannot do without: shards as [`Self::shard_addresses`], then the coordinator.
    pub fn processes(&mut self) -> impl Iterator<Item = &mut ServiceProcess> {
        self.shards.iter_mut().map(Supervised::process).chain([&mut self.coordinator])
    }

    /// Waits until the cluster cannot go on: the coordinator has ended, or a shard that has done so too often. Meanwhile
    /// shards and draft that end are started again. Safe to cancel.
    pub async fn any_ended(&mut self) -> ServiceEnded {
        let kept = self.shards.iter_mut().chain(&mut self.draft).map(Supervised::keep);
        tokio::select! {
            ended = self.coordinator.ended() => ended,
            ended = first(kept) => ended,
        }
    }

    /// Stops all processes, the coordinator first, so that streams end before shards go.
    pub async fn stop(self) {
        self.coordinator.stop(STOP_GRACE).await;
        let mut others: Vec<_> =
            self.draft.into_iter().chain(self.shards).map(Supervised::into_process).collect();
        others.iter_mut().for_each(ServiceProcess::ask_to_end);
        for process in others {
            process.stop(STOP_GRACE).await;
        }
    }
}

/// `total` compute threads over ranks: as even as possible, and at least one each.
pub fn share_threads(total: usize, n_ranks: usize) -> Vec<usize> {
    (0..n_ranks).map(|rank| (total / n_ranks + usize::from(rank < total % n_ranks)).max(1)).collect()
}

async fn listening(service: &mut ServiceProcess) -> anyhow::Result<String> {
    let event = timeout(LISTEN_DEADLINE, service.next_event());
    match event.await.with_context(|| format!("{} does not listen", service.name()))?? {
        Event::Listening { address } => Ok(address),
        other => bail!("{} said {other:?} before it listened", service.name()),
    }
}

/// Waits until every group is ready.
async fn ready(
    coordinator: &mut ServiceProcess,
    spec: &ClusterSpec,
    progress: &Progress,
) -> anyhow::Result<(String, Option<String>)> {
    let mut bars: BTreeMap<(usize, u32), Bar> = BTreeMap::new();
    let mut are_ready = BTreeSet::new();
    let n_ranks = spec.n_ranks();
    loop {
        match coordinator.next_event().await? {
            Event::Listening { .. } => {}
            // All shards listen already, so trying again would not help.
            Event::Forming { problem, .. } => bail!("the group cannot be formed: {problem}"),
            Event::Loading { group, rank, done_bytes, total_bytes } => {
                let of_group = if spec.n_groups == 1 { String::new() } else { format!(", group {group}") };
                let label = || format!("loading rank {rank} of {n_ranks}{of_group}");
                let bar = bars.entry((group, rank));
                bar.or_insert_with(|| progress.bytes(&label(), total_bytes)).set(done_bytes);
            }
            Event::Ready { group, address, http, quantize, weight_bytes, saved_bytes, .. } => {
                let is_first = are_ready.is_empty();
                are_ready.insert(group);
                if let Some(quantization) = quantize.filter(|_| is_first) {
                    progress.line(&quantized(&quantization, weight_bytes, saved_bytes));
                }
                if are_ready.len() == spec.n_groups {
                    bars.values().for_each(Bar::finish);
                    return Ok((address, http));
                }
            }
        }
    }
}

/// What quantization at load has brought, for people.
pub fn quantized(quantization: &str, weight_bytes: u64, saved_bytes: u64) -> String {
    let (weights, saved) = (megabytes(weight_bytes), megabytes(saved_bytes));
    if saved_bytes == 0 {
        return format!(
            "--quantize {quantization}: nothing to quantize, the file has no fitting float matrix"
        );
    }
    format!("weights quantized to {quantization} at load: {weights}, {saved} less than in the file")
}

/// What the first of several waits gives; for ever where there is none.
async fn first<F: Future>(waits: impl Iterator<Item = F>) -> F::Output {
    let mut waits: Vec<_> = waits.map(Box::pin).collect();
    poll_fn(|context| {
        let done = waits.iter_mut().find_map(|wait| match wait.as_mut().poll(context) {
            Poll::Ready(done) => Some(done),
            Poll::Pending => None,
        });
        done.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_shared_evenly_and_nobody_goes_without() {
        assert_eq!(share_threads(8, 2), [4, 4]);
        assert_eq!(share_threads(7, 3), [3, 2, 2]);
        assert_eq!(share_threads(2, 4), [1, 1, 1, 1]);
        assert_eq!(share_threads(5, 1), [5]);
    }
}
