//! A gRPC server for other services of the cluster: with health and reflection, quick to notice a peer that is gone, and
//! with an end that open streams cannot hold up.

use std::{future::Future, net::SocketAddr, time::Duration};

use anyhow::Context as _;
use paceline_wire::DESCRIPTORS;
use tokio::{net::TcpListener, sync::oneshot, time::sleep};
use tonic::{
    server::NamedService,
    service::Routes,
    transport::{Server, server::TcpIncoming},
};

/// How often a peer that says nothing is asked whether it is there, and how long it may take to answer.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(4));
/// Streams that a peer may reset before its connection is closed: cancelling is normal.
const MAX_RESETS: usize = 1024;

/// What is served, and how.
#[derive(Debug)]
pub struct Internal {
    /// The service.
    pub routes: Routes,
    /// Most streams of one connection.
    pub max_streams: u32,
    /// How long streams may take to end after a shutdown was asked for; then they are cut.
    pub drain: Duration,
}

/// Binds an address.
///
/// # Errors
/// When that is not possible.
pub async fn listen(address: SocketAddr) -> anyhow::Result<TcpListener> {
    let listener = TcpListener::bind(address).await;
    listener.with_context(|| format!("cannot listen on {address}: is another process there?"))
}

impl Internal {
    /// Serves `S` until `shutdown` resolves.
    ///
    /// # Errors
    /// When the connection cannot be served.
    pub async fn serve<S: NamedService>(
        self,
        listener: TcpListener,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> anyhow::Result<()> {
        let (health_reporter, health) = tonic_health::server::health_reporter();
        health_reporter.set_serving::<S>().await;
        let reflection = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
            .build_v1()
            .context("reflection descriptors")?;
        let (stopped, stop) = oneshot::channel();
        let serving = Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE.0))
            .http2_keepalive_timeout(Some(KEEPALIVE.1))
            .http2_max_local_error_reset_streams(Some(MAX_RESETS))
            .max_concurrent_streams(Some(self.max_streams))
            .add_routes(self.routes)
            .add_service(health)
            .add_service(reflection)
            .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), async {
                shutdown.await;
                let _ = stopped.send(());
            });
        tokio::select! {
            served = serving => served.context("serving gRPC"),
            () = async { let _ = stop.await; sleep(self.drain).await } => Ok(()),
        }
    }
}
