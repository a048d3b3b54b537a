//! Tests of forming a group, with doubles of shards that load nothing.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
};

use futures_util::Stream;
use paceline_wire::shard::shard_server::{Shard, ShardServer};
use tokio::net::TcpListener;
use tonic::{
    Request, Response,
    transport::{Server, server::TcpIncoming},
};

use super::*;
use crate::pool::PoolBounds;

/// What a double says, and what it was told.
#[derive(Clone, Default)]
struct Double {
    welcome: Welcome,
    ready: Ready,
    told: Arc<Mutex<Vec<coordinator_message::Message>>>,
}

type Messages = Pin<Box<dyn Stream<Item = Result<ShardMessage, Status>> + Send>>;

#[tonic::async_trait]
impl Shard for Double {
    type SessionStream = Messages;

    async fn session(
        &self,
        request: Request<Streaming<CoordinatorMessage>>,
    ) -> Result<Response<Messages>, Status> {
        let (mut inbox, (outbox, answers)) = (request.into_inner(), mpsc::channel(4));
        let double = self.clone();
        tokio::spawn(async move {
            while let Ok(Some(CoordinatorMessage { message: Some(message) })) = inbox.message().await {
                let answer = match &message {
                    coordinator_message::Message::Hello(_) => {
                        shard_message::Message::Welcome(double.welcome.clone())
                    }
                    _ => shard_message::Message::Ready(double.ready.clone()),
                };
                double.told.lock().expect("lock").push(message);
                let _ = outbox.send(Ok(ShardMessage { message: Some(answer) })).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

impl Double {
    fn on_gpu(memory_bytes: u64, device_numerics: u32) -> Self {
        let welcome = Welcome {
            memory_bytes,
            fixed_bytes: 1_000,
            kv_block_bytes: 10,
            memory_id: format!("GPU-{device_numerics}"),
            ..Welcome::default()
        };
        Self { welcome, ready: Ready { numerics: 2, device_numerics, ..Ready::default() }, ..Self::default() }
    }

    fn on_cpu(numerics: u32) -> Self {
        Self { ready: Ready { numerics, ..Ready::default() }, ..Self::default() }
    }

    async fn serve(&self) -> Uri {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let server = Server::builder().add_service(ShardServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(TcpIncoming::from(listener)));
        format!("http://{address}").parse().expect("a URI")
    }

    fn hello(&self) -> Hello {
        match self.told.lock().expect("lock").first() {
            Some(coordinator_message::Message::Hello(hello)) => hello.clone(),
            other => panic!("first came {other:?}"),
        }
    }

    fn form(&self) -> Option<Form> {
        self.told.lock().expect("lock").iter().find_map(|message| match message {
            coordinator_message::Message::Form(form) => Some(form.clone()),
            _ => None,
        })
    }
}

async fn form(doubles: &[Double], pool: PoolWish) -> Result<ShardGroup, FormError> {
    let mut shards = Vec::new();
    for double in doubles {
        shards.push(double.serve().await);
    }
    let spec = GroupSpec {
        shards,
        model: Digest([7; 32]),
        quantize: Some(Quantization::Q4_K),
        pool,
        kv_type: KvType::F16,
        max_rows: 32,
        max_sampled_rows: 8,
        n_vocab: 100,
        collective_deadline: Duration::from_secs(1),
    };
    ShardGroup::form(&spec, Epoch(5), mpsc::channel(8).0, mpsc::channel(8).0).await
}

const FIT: PoolWish = PoolWish::Fit(PoolBounds { context: 320, least: 20, most: 500, in_host_memory: 64 });

#[tokio::test]
async fn the_pool_is_sized_by_what_the_shards_say() {
    let gpus = [Double::on_gpu(4_000, 8), Double::on_gpu(3_000, 9)];
    let group = form(&gpus, FIT).await.expect("a group");
    assert_eq!((group.n_kv_blocks, group.device_numerics()), (200, vec![8, 9]));
    for (rank, gpu) in gpus.iter().enumerate() {
        let seat =
            Seat { rank: rank as u32, n_ranks: 2, kv_type: "f16".into(), max_rows: 32, max_sampled_rows: 8 };
        assert_eq!((gpu.hello().seat, gpu.hello().quantize.as_str()), (Some(seat), "q4_k"));
        assert_eq!(gpu.form().map(|form| form.n_kv_blocks), Some(200));
    }
}

#[tokio::test]
async fn cpus_and_gpus_make_a_group() {
    let group = form(&[Double::on_gpu(4_000, 8), Double::on_cpu(2)], FIT).await.expect("a group");
    assert_eq!((group.n_kv_blocks, group.device_numerics()), (64, vec![8, 0]));
}

#[tokio::test]
async fn other_canonical_orders_make_none() {
    let error = form(&[Double::on_cpu(2), Double::on_cpu(3)], FIT).await.expect_err("must be refused");
    assert!(error.to_string().contains("[2, 3]"), "{error}");
}

#[tokio::test]
async fn a_group_that_cannot_hold_the_pool_loads_nothing() {
    let gpus = [Double::on_gpu(4_000, 8), Double::on_gpu(2_000, 9)];
    let error = form(&gpus, PoolWish::Exactly(200)).await.expect_err("must be refused").to_string();
    assert!(error.starts_with("FailedPrecondition: the GPU of rank 1"), "{error}");
    assert!(gpus.iter().all(|gpu| gpu.form().is_none()));
}
