//! A TCP proxy in front of a draft service that corrupts what it passes on: some bytes change, some connections break.

use std::net::SocketAddr;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
};

use crate::random::Random;

/// Bytes that pass unharmed at the beginning of a connection, so that some are of use for a while.
const SPARED: usize = 4_000;
/// How often a piece of what is passed on has a byte changed.
const HARM: f64 = 0.05;

/// Passes on connections to `service` until the task is aborted; where it listens.
///
/// # Errors
/// When no port is free.
pub async fn start(service: SocketAddr, seed: u64) -> std::io::Result<(SocketAddr, JoinHandle<()>)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let accepting = async move {
        let mut random = Random::new(seed);
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(service).await else { continue };
            let ((from_client, to_client), (from_server, to_server)) =
                (client.into_split(), server.into_split());
            tokio::spawn(pass_on(from_client, to_server, None));
            let random = Random::new(random.within(0..1 << 30) as u64);
            tokio::spawn(pass_on(from_server, to_client, Some(random)));
        }
    };
    Ok((address, tokio::spawn(accepting)))
}

/// Passes bytes on until either side ends; harms some where it has a source of chance.
async fn pass_on(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut random: Option<Random>) {
    let (mut piece, mut n_passed) = (vec![0; 4_096], 0);
    while let Ok(n @ 1..) = from.read(&mut piece).await {
        n_passed += n;
        if let Some(random) = random.as_mut().filter(|_| n_passed > SPARED)
            && random.happens(HARM)
        {
            piece[random.within(0..n)] ^= 1 << random.within(0..8);
        }
        if to.write_all(&piece[..n]).await.is_err() {
            return;
        }
    }
}
