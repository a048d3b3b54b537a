//! W3C trace context in gRPC metadata and in plan messages (<https://www.w3.org/TR/trace-context/>).

use std::collections::HashMap;

use opentelemetry::{
    global,
    propagation::{Extractor, Injector},
};
use tonic::metadata::{MetadataKey, MetadataMap};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

struct Metadata<'a>(&'a mut MetadataMap);

impl Injector for Metadata<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(key), Ok(value)) = (MetadataKey::from_bytes(key.as_bytes()), value.parse()) {
            self.0.insert(key, value);
        }
    }
}

struct MetadataRef<'a>(&'a MetadataMap);

impl Extractor for MetadataRef<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).and_then(|value| value.to_str().ok())
    }

    fn keys(&self) -> Vec<&str> {
        self.0
            .keys()
            .filter_map(|key| match key {
                tonic::metadata::KeyRef::Ascii(key) => Some(key.as_str()),
                tonic::metadata::KeyRef::Binary(_) => None,
            })
            .collect()
    }
}

/// Writes the span's context into outgoing gRPC metadata.
pub fn inject(span: &Span, metadata: &mut MetadataMap) {
    global::get_text_map_propagator(|propagator| {
        propagator.inject_context(&span.context(), &mut Metadata(metadata));
    });
}

/// Makes the caller's context in incoming gRPC metadata the parent of `span`. Call before `span` is entered.
pub fn adopt(span: &Span, metadata: &MetadataMap) {
    let parent = global::get_text_map_propagator(|propagator| propagator.extract(&MetadataRef(metadata)));
    set_parent(span, parent);
}

/// `traceparent` and `tracestate` of a span; both empty when the span has no trace.
pub fn to_headers(span: &Span) -> (String, String) {
    let mut headers = HashMap::new();
    global::get_text_map_propagator(|propagator| propagator.inject_context(&span.context(), &mut headers));
    let mut take = |key: &str| headers.remove(key).unwrap_or_default();
    (take("traceparent"), take("tracestate"))
}

/// As [`to_headers`], but both empty as well when the trace is not sampled: who gets them need not look.
pub fn sampled_headers(span: &Span) -> (String, String) {
    use opentelemetry::trace::TraceContextExt as _;
    if span.context().span().span_context().is_sampled() { to_headers(span) } else { Default::default() }
}

/// Makes the context in the two headers the parent of `span`. Empty or malformed headers leave it a root.
pub fn adopt_headers(span: &Span, traceparent: &str, tracestate: &str) {
    if !traceparent.is_empty() {
        set_parent(span, from_headers(traceparent, tracestate));
    }
}

/// Links `span` to the span in the two headers, if they have one.
pub fn link_headers(span: &Span, traceparent: &str, tracestate: &str) {
    use opentelemetry::trace::TraceContextExt as _;
    let context = from_headers(traceparent, tracestate).span().span_context().clone();
    if context.is_valid() {
        span.add_link(context);
    }
}

fn from_headers(traceparent: &str, tracestate: &str) -> opentelemetry::Context {
    let headers: HashMap<String, String> =
        [("traceparent".into(), traceparent.into()), ("tracestate".into(), tracestate.into())].into();
    global::get_text_map_propagator(|propagator| propagator.extract(&headers))
}

/// Whether anybody will see the span: what belongs to one that is sampled out need not be recorded.
pub fn is_sampled(span: &Span) -> bool {
    use opentelemetry::trace::TraceContextExt as _;
    span.context().span().span_context().is_sampled()
}

/// Links `span` to the trace of `other`: a batch is linked to each request it serves.
pub fn link(span: &Span, other: &Span) {
    use opentelemetry::trace::TraceContextExt as _;
    let context = other.context().span().span_context().clone();
    if context.is_valid() {
        span.add_link(context);
    }
}

fn set_parent(span: &Span, parent: opentelemetry::Context) {
    // The only failures are a span that is disabled or already started: both mean there is nothing to trace.
    let _ = span.set_parent(parent);
}
