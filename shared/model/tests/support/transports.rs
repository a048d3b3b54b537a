//! Ranks as threads that reach each other by the real transports.

use std::time::Duration;

use paceline_collectives::{AbortFlag, BindSpec, Collective, Endpoint, GroupSpec, Transport, connect};
use paceline_domain::Epoch;

/// One member for each rank.
pub fn group(transport: Transport, n_ranks: usize) -> Vec<Box<dyn Collective>> {
    let endpoints: Vec<Endpoint> =
        (0..n_ranks).map(|_| Endpoint::bind(&BindSpec::default()).expect("an endpoint")).collect();
    let peers: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address().clone()).collect();
    let joining: Vec<_> = endpoints
        .into_iter()
        .enumerate()
        .map(|(rank, endpoint)| {
            let spec = GroupSpec {
                rank,
                epoch: Epoch(1),
                peers: peers.clone(),
                secret: [7; 32],
                transport,
                connect_deadline: Duration::from_secs(60),
                deadline: Duration::from_secs(300),
                abort: AbortFlag::new(),
            };
            std::thread::spawn(move || connect(endpoint, &spec).expect("a group"))
        })
        .collect();
    joining.into_iter().map(|rank| rank.join().expect("a rank")).collect()
}
