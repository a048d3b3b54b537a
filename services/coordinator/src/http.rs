//! The HTTP port: metrics and health, for Prometheus and for whoever restarts processes. It answers from what others keep
//! up to date and never waits for the engine.

use std::sync::Arc;

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};

use crate::{
    groups::GroupStatus,
    metrics::{self, Metrics},
};

/// What answers are made of.
#[derive(Clone)]
struct Face {
    metrics: Arc<Metrics>,
    status: watch::Receiver<Vec<GroupStatus>>,
}

/// Serves for as long as it is polled.
///
/// # Errors
/// When the listener fails.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    status: watch::Receiver<Vec<GroupStatus>>,
) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/metrics", get(scrape))
        .route("/health/live", get(|| async { "live\n" }))
        .route("/health/ready", get(ready))
        .with_state(Face { metrics, status });
    axum::serve(listener, routes).await
}

async fn scrape(State(face): State<Face>) -> Response {
    match face.metrics.text() {
        Ok(text) => ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    }
}

/// Whether a shard group executes plans; one is enough.
async fn ready(State(face): State<Face>) -> Response {
    let groups = face.status.borrow();
    if groups.iter().any(GroupStatus::is_ready) {
        return "ready\n".into_response();
    }
    let is_loading = groups.iter().any(|group| matches!(group, GroupStatus::Loading { .. }));
    let problem = if is_loading { "loading\n" } else { "no shard group\n" };
    (StatusCode::SERVICE_UNAVAILABLE, problem).into_response()
}
