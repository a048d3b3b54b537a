//! Tests of the session: who holds the shard, and what is said of its memory. Nothing is loaded.

use paceline_checkpoint::Checkpoint;
use paceline_collectives::Transport;
use paceline_model::{
    Backend, Device, LoadSpec, ModelConfig, ModelError,
    synthetic::{Synthetic, tiny_config},
};
use paceline_wire::shard::{Seat, shard_client::ShardClient, shard_server::ShardServer};
use tokio::{net::TcpListener, sync::oneshot::error::TryRecvError};
use tonic::transport::{Server, server::TcpIncoming};

use super::*;

/// A device with memory of its own.
struct Roomy;

impl Device for Roomy {
    fn name(&self) -> String {
        "roomy".into()
    }

    fn room(&self, spec: &LoadSpec<'_>) -> Result<Option<DeviceRoom>, ModelError> {
        let fixed_bytes = 100 * (spec.rank + 1) as u64;
        Ok(Some(DeviceRoom {
            memory: "here".into(),
            usable_bytes: 9_000,
            fixed_bytes,
            kv_block_bytes: spec.capacity.max_rows as u64,
        }))
    }

    fn load(&self, _spec: &LoadSpec<'_>) -> Result<Box<dyn Backend>, ModelError> {
        Err(ModelError::Load("nothing can be loaded here".into()))
    }
}

fn machine() -> Machine {
    let synthetic =
        Synthetic { config: tiny_config(), seed: 1, weight_type: |_, _| paceline_domain::WeightType::F32 };
    let checkpoint = Checkpoint::from_gguf_bytes(synthetic.to_gguf().expect("bytes")).expect("a checkpoint");
    Machine {
        config: Arc::new(ModelConfig::from_checkpoint(&checkpoint).expect("a configuration")),
        checkpoint: Arc::new(checkpoint),
        quantize: Some(Quantization::Q8_0),
        device: Arc::new(Roomy),
        n_threads: 1,
        transport: Transport::Auto,
    }
}

/// A session that has said Hello; it stays open as long as the sender lives.
type Session = (tokio::sync::mpsc::Sender<CoordinatorMessage>, Streaming<ShardMessage>);

async fn hello(address: &str, machine: &Machine, epoch: u64) -> Session {
    open(address, machine, epoch, "q8_0").await.expect("a session")
}

async fn open(address: &str, machine: &Machine, epoch: u64, quantize: &str) -> Result<Session, Status> {
    let seat = Seat { rank: 1, n_ranks: 2, kv_type: "f16".into(), max_rows: 32, max_sampled_rows: 8 };
    let hello = Hello {
        protocol: PROTOCOL_VERSION,
        epoch,
        model_digest: machine.checkpoint.digest().0.to_vec(),
        seat: Some(seat),
        quantize: quantize.into(),
    };
    let (outbox, messages) = tokio::sync::mpsc::channel(4);
    let message = Some(coordinator_message::Message::Hello(hello));
    outbox.send(CoordinatorMessage { message }).await.expect("room in the channel");
    let mut client = ShardClient::connect(address.to_owned()).await.expect("a connection");
    let response = client.session(ReceiverStream::new(messages)).await?;
    Ok((outbox, response.into_inner()))
}

async fn welcome(session: &mut Session) -> Welcome {
    match session.1.message().await.expect("an answer") {
        Some(ShardMessage { message: Some(shard_message::Message::Welcome(welcome)) }) => welcome,
        other => panic!("answered Hello with {other:?}"),
    }
}

async fn serve(machine: &Machine) -> String {
    let binding = BindSpec { host: "127.0.0.1".into(), port: 0, advertised_host: None };
    let service = ShardServer::new(ShardService::new(machine.clone(), binding));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener)));
    address
}

#[tokio::test]
async fn other_weights_are_refused() {
    let machine = machine();
    let address = serve(&machine).await;
    for (asked, shown) in [("", "none"), ("q4_k", "q4_k")] {
        let error = open(&address, &machine, 5, asked).await.expect_err("must be refused");
        assert_eq!(error.code(), tonic::Code::FailedPrecondition);
        let wanted = format!("quantization {shown}, this shard loads them with q8_0");
        assert!(error.message().contains(&wanted), "{error}");
    }
}

#[tokio::test]
async fn welcome_says_what_there_is_room_for_and_a_later_session_ends_the_one_before() {
    let machine = machine();
    let address = serve(&machine).await;
    let mut first = hello(&address, &machine, 5).await;
    let said = welcome(&mut first).await;
    assert_eq!((said.memory_bytes, said.fixed_bytes, said.kv_block_bytes), (9_000, 200, 32));
    assert_eq!(said.memory_id, "here");
    // The first session is open and idle; only its end makes place for the second.
    let mut second = hello(&address, &machine, 6).await;
    assert_eq!(welcome(&mut second).await.memory_bytes, 9_000);
    let ended = first.1.message().await.expect_err("must have ended");
    assert_eq!(ended.code(), tonic::Code::Aborted);
}

#[test]
fn a_higher_epoch_fences_the_session_before_it() {
    let occupancy = Occupancy::default();
    let [first, second] = [AbortFlag::new(), AbortFlag::new()];
    let mut fence = occupancy.enter(5, &first).unwrap();
    assert_eq!(occupancy.enter(5, &second).unwrap_err().code(), tonic::Code::Aborted);
    assert!(!first.is_set() && fence.try_recv() == Err(TryRecvError::Empty));
    let _later = occupancy.enter(6, &second).unwrap();
    assert!(first.is_set() && !second.is_set());
    assert_eq!(fence.try_recv(), Err(TryRecvError::Closed));
    occupancy.leave(5);
    assert!(occupancy.enter(6, &first).is_err(), "the later session still holds the shard");
    occupancy.leave(6);
    assert!(occupancy.enter(1, &AbortFlag::new()).is_ok(), "a free shard takes any epoch");
}
