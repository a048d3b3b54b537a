//! Whatever a client sends, it gets a status that says what to do, and the server goes on.

use std::io::Write as _;

use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{from_tokens, generate, greedy},
};
use paceline_wire::inference::{
    Chat, ChatMessage, DetokenizeRequest, GenerateRequest, ResponseFormat, SamplingOptions, StopOptions,
    TokenizeRequest, generate_request::Input, response_format::Format,
};
use prost::bytes::{Buf as _, BufMut as _};
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

type Change = fn(&mut GenerateRequest);

fn options(of: &mut GenerateRequest) -> &mut SamplingOptions {
    of.sampling.as_mut().expect("has sampling")
}

fn stop(of: &mut GenerateRequest) -> &mut StopOptions {
    of.stop.as_mut().expect("has stop rules")
}

fn schema(text: &str) -> Option<ResponseFormat> {
    Some(ResponseFormat { format: Some(Format::JsonSchema(text.into())) })
}

/// What is wrong, the code it must get, and a part of the message that tells the user.
const BAD: [(Change, Code, &str); 25] = [
    (|r| r.model = Some("gpt-5".into()), Code::NotFound, "test-model"),
    (
        |r| options(r).temperature = Some(-1.0),
        Code::InvalidArgument,
        "temperature is -1; it must be from 0 to 100",
    ),
    (|r| options(r).temperature = Some(f32::NAN), Code::InvalidArgument, "temperature is NaN"),
    (|r| options(r).temperature = Some(f32::INFINITY), Code::InvalidArgument, "temperature is inf"),
    (|r| options(r).top_p = Some(0.0), Code::InvalidArgument, "top_p is 0"),
    (|r| options(r).min_p = Some(1.5), Code::InvalidArgument, "min_p is 1.5"),
    (|r| options(r).repetition_penalty = Some(0.0), Code::InvalidArgument, "repetition_penalty is 0"),
    (|r| options(r).presence_penalty = Some(f32::NAN), Code::InvalidArgument, "presence_penalty is NaN"),
    (|r| options(r).logprobs = Some(21), Code::InvalidArgument, "at most 20"),
    (|r| options(r).logit_bias.extend([(60_000, 1.0)]), Code::InvalidArgument, "token 60000"),
    (|r| stop(r).min_tokens = Some(9999), Code::InvalidArgument, "must not be above max_tokens"),
    (
        |r| {
            stop(r).ignore_eos = None;
            r.response_format = schema("{\"type\": \"thing\"}");
        },
        Code::InvalidArgument,
        "JSON schema cannot be used",
    ),
    (
        |r| r.response_format = schema("{}"),
        Code::InvalidArgument,
        "not together with min_tokens or ignore_eos",
    ),
    (|r| r.n = Some(0), Code::InvalidArgument, "n is 0; it must be from 1 to 16"),
    (|r| options(r).logit_bias.extend([(6, 101.0)]), Code::InvalidArgument, "from -100 to 100"),
    (|r| r.input = None, Code::InvalidArgument, "`prompt`"),
    (|r| r.input = Some(Input::Prompt(String::new())), Code::InvalidArgument, "empty"),
    (|r| r.input = Some(Input::Chat(Chat { messages: vec![] })), Code::InvalidArgument, "messages"),
    (|r| r.input = from_tokens(vec![], 1).input, Code::InvalidArgument, "no tokens"),
    (|r| r.input = from_tokens(vec![49_152], 1).input, Code::InvalidArgument, "49152"),
    (
        |r| r.input = from_tokens(vec![5; 9000], 1).input,
        Code::InvalidArgument,
        "shorten the prompt by 809 tokens",
    ),
    (|r| stop(r).max_tokens = Some(0), Code::InvalidArgument, "max_tokens is 0"),
    (|r| stop(r).strings = vec!["x".into(); 17], Code::InvalidArgument, "at most 16"),
    (|r| stop(r).strings = vec!["x".repeat(513)], Code::InvalidArgument, "513 bytes"),
    (|r| stop(r).token_ids = vec![1; 65], Code::InvalidArgument, "at most 64"),
];

async fn refused(cluster: &TestCluster, request: GenerateRequest) -> Status {
    let mut client = cluster.client().await;
    generate(&mut client, request).await.expect_err("it must be refused")
}

#[tokio::test]
async fn every_bad_value_gets_its_code_and_a_message_with_the_limit() {
    let cluster = TestCluster::start(ClusterSpec::small(2)).await;
    let mut client = cluster.client().await;
    let good = generate(&mut client, greedy("One, two,", 4)).await.expect("generates");
    for (i, (change, code, part)) in BAD.iter().enumerate() {
        let mut request = greedy("One, two,", 4);
        change(&mut request);
        let status = refused(&cluster, request).await;
        assert_eq!(status.code(), *code, "case {i}: {status:?}");
        assert!(status.message().contains(part), "case {i}: `{part}` is not in `{}`", status.message());
    }
    let again = generate(&mut client, greedy("One, two,", 4)).await.expect("the server goes on");
    assert_eq!(again.tokens, good.tokens);
}

#[tokio::test]
async fn the_other_calls_check_their_input_too() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let mut client = cluster.client().await;
    let nothing = TokenizeRequest { model: None, input: None, parse_special: false };
    let status = client.tokenize(nothing).await.expect_err("no input");
    assert_eq!(status.code(), Code::InvalidArgument);
    let unknown = DetokenizeRequest { model: Some("x".into()), token_ids: vec![1], skip_special: false };
    assert_eq!(client.detokenize(unknown).await.expect_err("unknown model").code(), Code::NotFound);
    let outside = DetokenizeRequest { model: None, token_ids: vec![49_152], skip_special: false };
    let status = client.detokenize(outside).await.expect_err("no such token");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().contains("49152"), "{status:?}");
}

#[tokio::test]
async fn what_never_fits_is_told_apart_from_what_is_wrong() {
    let spec = ClusterSpec::small(1).coordinator_args(&["--kv-blocks", "2"]);
    let cluster = TestCluster::start(spec).await;
    let status = refused(&cluster, greedy("One, two,", 100)).await;
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("--kv-blocks"), "{status:?}");
    let mut client = cluster.client().await;
    assert_eq!(generate(&mut client, greedy("One, two,", 8)).await.expect("fits").tokens.len(), 8);
}

#[tokio::test]
async fn a_template_that_refuses_is_the_clients_error() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let messages = (0..5000).map(|_| ChatMessage { role: "user".into(), content: "x".into() }).collect();
    let mut request = greedy("", 4);
    request.input = Some(Input::Chat(Chat { messages }));
    let status = refused(&cluster, request).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    assert!(status.message().contains("5000 messages"), "{status:?}");
}

/// Sends bytes as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put_slice(&item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let n = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(n).to_vec()))
    }
}

async fn send_raw(cluster: &TestCluster, bytes: &[u8]) -> Result<(), Status> {
    let endpoint = Channel::from_shared(cluster.address()).expect("a URL");
    let mut grpc = Grpc::new(endpoint.connect().await.expect("connects"));
    grpc.ready().await.expect("is ready");
    let path = http::uri::PathAndQuery::from_static("/paceline.v1.Inference/Generate");
    grpc.server_streaming(Request::new(bytes.to_vec()), path, Raw).await.map(drop)
}

#[tokio::test]
async fn malformed_messages_are_refused_and_the_server_goes_on() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let malformed: [&[u8]; 5] = [
        // Field 5 claims 127 bytes and has one.
        &[0x2a, 0x7f, 0x01],
        // Field 2, a string, is not UTF-8.
        &[0x12, 0x02, 0xff, 0xfe],
        // Field 1, a string, is a number.
        &[0x08, 0x01],
        // A field number of zero.
        &[0x00, 0x00],
        // A varint without an end.
        &[0xff; 16],
    ];
    for bytes in malformed {
        let status = send_raw(&cluster, bytes).await.expect_err("malformed");
        assert!(matches!(status.code(), Code::Internal | Code::InvalidArgument), "{bytes:?}: {status:?}");
    }
    let too_large = send_raw(&cluster, &vec![0; 5 << 20]).await.expect_err("too large");
    assert!(matches!(too_large.code(), Code::OutOfRange | Code::ResourceExhausted), "{too_large:?}");
    let mut client = cluster.client().await;
    generate(&mut client, greedy("One, two,", 4)).await.expect("the server goes on");
}

#[tokio::test]
async fn noise_on_the_port_harms_nobody() {
    let cluster = TestCluster::start(ClusterSpec::small(1)).await;
    let address = cluster.address().trim_start_matches("http://").to_owned();
    let noise: [&[u8]; 4] = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        &[0x16, 0x03, 0x01, 0x02, 0x00, 0x01],
        &[],
    ];
    for bytes in noise {
        let mut connection = std::net::TcpStream::connect(&address).expect("connects");
        connection.write_all(bytes).expect("writes");
    }
    let mut client = cluster.client().await;
    generate(&mut client, greedy("One, two,", 4)).await.expect("the server goes on");
}
