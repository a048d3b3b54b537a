//! The HTTP port of a real cluster: health, and metrics that count what was done.

use paceline_tests::{
    ClusterSpec, TestCluster,
    client::{generate, generate_choices, greedy},
    scrape::{get, of_group, scraped},
};
use paceline_wire::inference::{GenerateRequest, SpeculationMode, SpeculationOptions};

#[tokio::test]
async fn metrics_count_what_was_done() {
    let spec =
        ClusterSpec::small(2).coordinator_args(&["--http-listen", "127.0.0.1:0", "--kv-blocks", "520"]);
    let cluster = TestCluster::start(spec).await;
    let mut client = cluster.client().await;
    assert!(get(&cluster.http(), "/health/ready").await.0.starts_with("http/1.1 200"));
    assert!(get(&cluster.http(), "/health/live").await.0.starts_with("http/1.1 200"));
    assert!(get(&cluster.http(), "/elsewhere").await.0.starts_with("http/1.1 404"));

    let prompt = "one two three four five six seven eight nine ten ".repeat(4);
    let options = SpeculationOptions { mode: Some(SpeculationMode::Ngram.into()), max_tokens: None };
    let repetitive = GenerateRequest { speculation: Some(options), ..greedy(&prompt, 120) };
    let first = generate(&mut client, repetitive).await.expect("generates");
    let three = GenerateRequest { n: Some(3), ..greedy(&prompt, 8) };
    let choices = generate_choices(&mut client, three).await.expect("generates");
    let mut bad = greedy(&prompt, 8);
    bad.sampling.as_mut().expect("has sampling").temperature = Some(-1.0);
    generate(&mut client, bad).await.expect_err("is refused");
    generate(&mut client, GenerateRequest { model: Some("other".into()), ..greedy("x", 1) })
        .await
        .expect_err("is refused");

    let metrics = scraped(&cluster.http()).await;
    let n_prompt = f64::from(first.started.n_prompt_tokens);
    let n_cached: u32 =
        choices.iter().map(|choice| choice.finished.usage.expect("usage").cached_tokens).sum();
    let proposed: u64 = [&first]
        .into_iter()
        .chain(&choices)
        .flat_map(|one| &one.finished.proposals)
        .map(|counts| counts.draft_tokens)
        .sum();
    assert!(n_cached > 0, "the prompt was computed again");
    for (name, value) in [
        ("paceline_input_tokens_total", 2.0 * n_prompt),
        ("paceline_output_tokens_total", 144.0),
        ("paceline_choices_total{reason=\"length\"}", 4.0),
        ("paceline_rejected_total{reason=\"invalid\"}", 1.0),
        ("paceline_rejected_total{reason=\"unknown_model\"}", 1.0),
        ("paceline_prefix_cache_queried_tokens_total", 4.0 * n_prompt),
        ("paceline_prefix_cache_hit_tokens_total", f64::from(n_cached)),
        ("paceline_prefix_cache_hit_ratio", f64::from(n_cached) / (4.0 * n_prompt)),
        ("paceline_speculation_draft_tokens_total{source=\"ngram\"}", proposed as f64),
        ("paceline_preemptions_total", 0.0),
        ("paceline_groups_formed_total", 1.0),
        ("paceline_queue_length", 0.0),
        ("paceline_running_sequences", 0.0),
        ("paceline_kv_blocks_used", 0.0),
        ("paceline_kv_blocks_free", 520.0),
        ("gen_ai_server_time_to_first_token_seconds_count", 4.0),
        ("gen_ai_server_time_to_first_token_seconds_bucket{le=\"+Inf\"}", 4.0),
        ("paceline_inter_token_latency_seconds_count", 140.0),
        ("gen_ai_server_time_per_output_token_seconds_count", 4.0),
        ("gen_ai_server_request_duration_seconds_count", 4.0),
    ] {
        let name = of_group(0, name);
        assert_eq!(metrics.get(&name), Some(&value), "{name}");
    }
    assert!(metrics[&of_group(0, "paceline_step_seconds_count")] >= 2.0);
    assert!(metrics[&of_group(0, "paceline_step_seconds_sum")] > 0.0);
    assert!(metrics[&of_group(0, "paceline_step_rows_total")] >= n_prompt + 100.0);
}
