//! A draft service that is stopped, killed and started again, while requests run without a pause: every request ends, with the
//! tokens it gets without speculation. Whether it is of use meanwhile is for `hostile_drafts`, where steps take as long as is said.

use std::{process::Command, time::Duration};

use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{greedy, seeded},
    draft_load::{Known, during, known},
    models::small_model,
    scrape::metric,
};
use paceline_wire::inference::{GenerateRequest, SpeculationMode, inference_client::InferenceClient};
use tonic::transport::Channel;

/// Far above what anything here takes.
const DEADLINE: Duration = Duration::from_secs(120);
const N_CLIENTS: usize = 3;
const CONNECTIONS: &str = "paceline_draft_connections_total";

fn requests() -> Vec<GenerateRequest> {
    vec![
        greedy("one two three four one two three four one two three", 40),
        seeded("fn main() {\n    let x = 1;\n", 40, 7),
        greedy("The capital of France is", 24),
        seeded("Once upon a time", 48, 8),
    ]
}

fn spec() -> ClusterSpec {
    ClusterSpec::small(1).coordinator_args(&["--http-listen", "127.0.0.1:0", "--draft-placement", "apart"])
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([name, &pid.to_string()]).status().expect("kill runs");
    assert!(status.success(), "{name} {pid}");
}

/// Asks in both modes that use a draft, and compares.
async fn under_load(
    client: &InferenceClient<Channel>,
    known: &[Known],
    mode: SpeculationMode,
    what: impl Future<Output = ()>,
) {
    let (_, seen) = during(client, (known, mode), N_CLIENTS, what).await.expect("every request ends");
    assert_eq!(seen.n_different, 0, "of {} requests", seen.n_requests);
    assert!(seen.n_requests >= N_CLIENTS);
}

/// Waits for one more connection to a draft service than there were.
async fn connected(http: &str, n_before: f64) {
    let connects = async {
        while metric(http, CONNECTIONS).await <= n_before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(DEADLINE, connects).await.expect("the draft service is connected");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_and_killed_under_load_it_is_missed_by_nobody_and_comes_back() {
    let mut cluster = TestCluster::start(spec().draft(small_model())).await;
    let (client, http) = (cluster.client().await, cluster.http());
    let known = known(&client, requests()).await.expect("generates");
    under_load(&client, &known, SpeculationMode::Draft, connected(&http, 0.0)).await;
    for mode in [SpeculationMode::Draft, SpeculationMode::Auto] {
        let pid = cluster.processes().draft().and_then(|draft| draft.pid()).expect("it runs");
        signal(pid, "-STOP");
        // Nobody waits for it: requests begin and end meanwhile.
        under_load(&client, &known, mode, tokio::time::sleep(Duration::from_secs(4))).await;
        signal(pid, "-CONT");
        under_load(&client, &known, mode, tokio::time::sleep(Duration::from_secs(1))).await;

        let n_before = metric(&http, CONNECTIONS).await;
        let processes = cluster.processes();
        let killed = async {
            signal(pid, "-KILL");
            tokio::select! {
                ended = processes.any_ended() => panic!("{ended}"),
                () = connected(&http, n_before) => {}
            }
        };
        under_load(&client, &known, mode, killed).await;
        let after = cluster.processes().draft().and_then(|draft| draft.pid()).expect("it runs again");
        assert_ne!(after, pid);
    }
    cluster.stop().await;
}
