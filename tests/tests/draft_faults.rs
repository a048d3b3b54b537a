//! A draft service that is stopped, killed, started again or whose words are corrupted, while requests run without a
//! pause: every request ends, with the tokens it gets without speculation.

use std::{ffi::OsString, net::SocketAddr, process::Command, time::Duration};

use paceline::{
    event::Event,
    process::{Log, ServiceProcess, ServiceSpec},
};
use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{greedy, seeded},
    corrupting_proxy,
    draft_load::{Known, Seen, during, known, metric, until_drafted},
    models::small_model,
    program::paceline,
};
use paceline_wire::inference::{GenerateRequest, SpeculationMode, inference_client::InferenceClient};
use tonic::transport::Channel;

/// Far above what anything here takes.
const DEADLINE: Duration = Duration::from_secs(120);
const N_CLIENTS: usize = 3;

fn requests() -> Vec<GenerateRequest> {
    vec![
        greedy("one two three four one two three four one two three", 40),
        seeded("fn main() {\n    let x = 1;\n", 40, 7),
        greedy("The capital of France is", 24),
        seeded("Once upon a time", 48, 8),
    ]
}

fn spec() -> ClusterSpec {
    // It is said to have a machine of its own, so that it drafts whatever that costs here.
    ClusterSpec::small(1).coordinator_args(&["--http-listen", "127.0.0.1:0", "--draft-placement", "apart"])
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([name, &pid.to_string()]).status().expect("kill runs");
    assert!(status.success(), "{name} {pid}");
}

/// Asks in both modes that use a draft, and compares.
async fn under_load<T>(
    client: &InferenceClient<Channel>,
    known: &[Known],
    mode: SpeculationMode,
    what: impl Future<Output = T>,
) -> (T, Seen) {
    let (came, seen) = during(client, (known, mode), N_CLIENTS, what).await.expect("every request ends");
    assert_eq!(seen.n_different, 0, "of {} requests", seen.n_requests);
    assert!(seen.n_requests >= N_CLIENTS);
    (came, seen)
}

async fn drafted_again(http: &str) {
    let waited = until_drafted(http, DEADLINE).await.expect("metrics");
    assert!(waited.is_some(), "speculation does not come back");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopped_and_killed_under_load_it_is_missed_by_nobody_and_comes_back() {
    let mut cluster = TestCluster::start(spec().draft(small_model())).await;
    let (client, http) = (cluster.client().await, cluster.http());
    let known = known(&client, requests()).await.expect("generates");
    under_load(&client, &known, SpeculationMode::Draft, drafted_again(&http)).await;
    for mode in [SpeculationMode::Draft, SpeculationMode::Auto] {
        let pid = cluster.processes().draft().and_then(|draft| draft.pid()).expect("it runs");
        signal(pid, "-STOP");
        // Nobody waits for it: requests begin and end meanwhile.
        under_load(&client, &known, mode, tokio::time::sleep(Duration::from_secs(4))).await;
        let back = async {
            signal(pid, "-CONT");
            drafted_again(&http).await;
        };
        under_load(&client, &known, SpeculationMode::Draft, back).await;

        let processes = cluster.processes();
        let killed = async {
            signal(pid, "-KILL");
            tokio::select! {
                ended = processes.any_ended() => panic!("{ended}"),
                () = drafted_again(&http) => {}
            }
        };
        under_load(&client, &known, mode, killed).await;
    }
    assert!(metric(&http, "paceline_draft_connections_total").await.expect("metrics") >= 3.0);
    cluster.stop().await;
}

async fn draft_process() -> (ServiceProcess, SocketAddr) {
    let model = small_model().into_os_string();
    let args: [OsString; 6] =
        ["draft", "--listen", "127.0.0.1:0", "--threads", "1", "--model"].map(Into::into);
    let spec = ServiceSpec {
        name: "draft".into(),
        program: paceline(),
        args: args.into_iter().chain([model]).collect(),
        env: Vec::new(),
        log: Log::Keep,
    };
    let mut process = ServiceProcess::start(&spec).expect("starts");
    match process.next_event().await.expect("it lives") {
        Event::Listening { address, .. } => (process, address.parse().expect("an address")),
        other => panic!("{other:?} before it listens"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_corrupted_on_its_way_changes_no_token() {
    let (process, service) = draft_process().await;
    let (proxy, passing_on) = corrupting_proxy::start(service, 5).await.expect("a port");
    let cluster = TestCluster::start(spec().coordinator_args(&["--draft", &format!("http://{proxy}")])).await;
    let (client, http) = (cluster.client().await, cluster.http());
    let known = known(&client, requests()).await.expect("generates");
    let harmed = async {
        // A connection that breaks was harmed, and every new one is of use at first.
        while metric(&http, "paceline_draft_connections_total").await.expect("metrics") < 4.0 {
            drafted_again(&http).await;
        }
    };
    let harmed = tokio::time::timeout(DEADLINE, harmed);
    let (in_time, _) = under_load(&client, &known, SpeculationMode::Draft, harmed).await;
    in_time.expect("connections break");
    cluster.stop().await;
    passing_on.abort();
    process.stop(Duration::from_secs(5)).await;
}
