//! One trace from the client through coordinator and shards, as a real OTLP receiver sees it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{KeyValue, any_value::Value},
    trace::v1::Span,
};
use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{generate, greedy},
    models::small_model,
    program::command,
};
use paceline_wire::inference::{GenerateRequest, SpeculationMode, SpeculationOptions};
use tokio::net::TcpListener;
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CLIENT_SPAN: &str = "b7ad6b7169203331";

/// A span with the service that sent it.
#[derive(Clone, Debug)]
struct Received {
    service: String,
    span: Span,
}

/// Keeps every span it is sent.
#[derive(Clone, Default)]
struct Receiver(Arc<Mutex<Vec<Received>>>);

#[tonic::async_trait]
impl TraceService for Receiver {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().expect("not poisoned");
        for resource_spans in request.into_inner().resource_spans {
            let attributes = resource_spans.resource.map(|resource| resource.attributes).unwrap_or_default();
            let service = text(&attributes, "service.name").expect("a service name");
            let received = resource_spans.scope_spans.into_iter().flat_map(|scope| scope.spans);
            spans.extend(received.map(|span| Received { service: service.clone(), span }));
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn value<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Value> {
    let attribute = attributes.iter().find(|attribute| attribute.key == key)?;
    attribute.value.as_ref()?.value.as_ref()
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    match value(attributes, key)? {
        Value::StringValue(text) => Some(text.clone()),
        _ => None,
    }
}

fn number(attributes: &[KeyValue], key: &str) -> Option<i64> {
    match value(attributes, key)? {
        Value::IntValue(number) => Some(*number),
        _ => None,
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn receiver() -> (Receiver, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("binds");
    let address = format!("http://{}", listener.local_addr().expect("has an address"));
    let receiver = Receiver::default();
    let service = TraceServiceServer::new(receiver.clone());
    let server = tonic::transport::Server::builder().add_service(service);
    tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
    (receiver, address)
}

fn traced(request: GenerateRequest, flags: &str) -> Request<GenerateRequest> {
    let mut request = Request::new(request);
    let header = format!("00-{TRACE}-{CLIENT_SPAN}-{flags}");
    request.metadata_mut().insert("traceparent", header.parse().expect("ASCII"));
    request
}

/// All spans of a cluster that answered one request.
async fn spans_of(n_ranks: usize, flags: &str) -> Vec<Received> {
    let (receiver, endpoint) = receiver().await;
    let spec = ClusterSpec::small(n_ranks).env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
    let cluster = TestCluster::start(spec).await;
    let mut client = cluster.client().await;
    let request = traced(greedy("The quick brown fox", 4), flags);
    assert_eq!(generate(&mut client, request).await.expect("generates").tokens.len(), 4);
    drop(client);
    cluster.stop().await;
    receiver.0.lock().expect("not poisoned").clone()
}

#[tokio::test]
async fn one_trace_id_is_seen_in_the_coordinator_and_every_shard() {
    let n_ranks = 3;
    let received = spans_of(n_ranks, "01").await;
    let ours: Vec<&Received> =
        received.iter().filter(|received| hex(&received.span.trace_id) == TRACE).collect();
    let services: BTreeSet<&str> = ours.iter().map(|received| received.service.as_str()).collect();
    assert_eq!(services, BTreeSet::from(["paceline-coordinator", "paceline-shard"]));

    let by_id: HashMap<String, &Received> =
        ours.iter().map(|received| (hex(&received.span.span_id), *received)).collect();
    assert_eq!(by_id.len(), ours.len(), "span ids are distinct");
    for received in &ours {
        let parent = hex(&received.span.parent_span_id);
        let known = parent == CLIENT_SPAN || by_id.contains_key(&parent);
        assert!(known, "{} of {} has the parent {parent}", received.span.name, received.service);
    }

    let entry: Vec<_> =
        ours.iter().filter(|received| hex(&received.span.parent_span_id) == CLIENT_SPAN).collect();
    assert_eq!(entry.len(), 1, "one span is the client's child");
    assert_eq!(entry[0].service, "paceline-coordinator");
    assert_eq!(entry[0].span.name, "generate test-model");
    assert_eq!(number(&entry[0].span.attributes, "paceline.group"), Some(0));

    let forwards: Vec<_> = ours.iter().filter(|received| received.span.name == "forward").collect();
    let ranks: HashSet<i64> =
        forwards.iter().filter_map(|received| number(&received.span.attributes, "rank")).collect();
    assert_eq!(ranks, (0..n_ranks as i64).collect(), "every shard has spans in the trace");
    for forward in forwards {
        let step = by_id[&hex(&forward.span.parent_span_id)];
        assert_eq!((step.service.as_str(), step.span.name.as_str()), ("paceline-coordinator", "step"));
        assert_eq!(number(&step.span.attributes, "group"), Some(0));
    }
}

/// Requests after which a draft was tried, far above what it takes.
const MOST_REQUESTS: usize = 1_000;

#[tokio::test]
async fn waiting_for_the_draft_service_is_a_span_of_its_request() {
    let (receiver, endpoint) = receiver().await;
    let spec = ClusterSpec::small(1).draft(small_model()).env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint);
    let cluster = TestCluster::start(spec).await;
    let mut client = cluster.client().await;
    // A draft as slow as the model is not worth it; now and then it is tried all the same.
    let mut n_requests = 0;
    let mut is_drafted = false;
    while !is_drafted {
        assert!(n_requests < MOST_REQUESTS, "nothing was drafted for {n_requests} requests");
        n_requests += 1;
        let options = SpeculationOptions { mode: Some(SpeculationMode::Draft.into()), max_tokens: None };
        let request = GenerateRequest { speculation: Some(options), ..greedy("The quick brown fox", 48) };
        let generation = generate(&mut client, traced(request, "01")).await.expect("generates");
        is_drafted = generation.finished.proposals.iter().any(|counts| counts.draft_tokens > 0);
    }
    drop(client);
    cluster.stop().await;
    let received = receiver.0.lock().expect("not poisoned").clone();
    let by_id: HashMap<&[u8], &Span> =
        received.iter().map(|received| (received.span.span_id.as_slice(), &received.span)).collect();
    let drafts: Vec<&Received> = received.iter().filter(|received| received.span.name == "draft").collect();
    assert!(!drafts.is_empty(), "nothing was waited for");
    for draft in drafts {
        assert_eq!(by_id[draft.span.parent_span_id.as_slice()].name, "generate test-model");
        assert_eq!(number(&draft.span.attributes, "n_sequences"), Some(1));
    }
    let forwards: Vec<&Received> =
        received.iter().filter(|received| received.service == "paceline-draft").collect();
    assert!(!forwards.is_empty(), "the draft service drafted untraced");
    for forward in forwards {
        assert_eq!((forward.span.name.as_str(), hex(&forward.span.trace_id).as_str()), ("forward", TRACE));
        assert_eq!(by_id[forward.span.parent_span_id.as_slice()].name, "generate test-model");
        assert!(number(&forward.span.attributes, "n_rows") > Some(0));
    }
}

#[tokio::test]
async fn the_command_line_is_the_root_of_its_trace() {
    let (receiver, endpoint) = receiver().await;
    let model = small_model().to_string_lossy().into_owned();
    let arguments = ["run", "--model", &model, "--ranks", "2", "--max-tokens", "2", "Hello"];
    let output =
        command(&arguments).env("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint).output().await.expect("runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let received = receiver.0.lock().expect("not poisoned").clone();
    let root =
        received.iter().find(|received| received.service == "paceline").expect("a span of the command");
    assert_eq!((root.span.name.as_str(), root.span.parent_span_id.len()), ("paceline run", 0));
    let trace = received.iter().filter(|received| received.span.trace_id == root.span.trace_id);
    let services: BTreeSet<&str> = trace.map(|received| received.service.as_str()).collect();
    assert_eq!(services, BTreeSet::from(["paceline", "paceline-coordinator", "paceline-shard"]));
}

#[tokio::test]
async fn prompts_and_answers_are_in_no_span() {
    let received = spans_of(1, "01").await;
    assert!(!received.is_empty());
    let all = format!("{received:?}");
    assert!(!all.contains("quick brown"), "the prompt is in a span");
}

#[tokio::test]
async fn a_trace_that_its_client_does_not_sample_is_not_sent() {
    let received = spans_of(2, "00").await;
    let ours = received.iter().filter(|received| hex(&received.span.trace_id) == TRACE).count();
    assert_eq!(ours, 0);
}
