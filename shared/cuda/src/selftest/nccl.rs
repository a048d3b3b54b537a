//! What a single GPU can show of NCCL: a rank alone has the same bits with and without it, and a peer that never comes keeps
//! nobody. Sums over several GPUs need several.

use std::thread;
use std::time::{Duration, Instant};

use paceline_collectives::{AbortFlag, Solo};
use paceline_domain::{ErrorKind, WeightType};
use paceline_model::SplitPlan;
use paceline_model::link::{Group, Route};

use super::{Check, DEADLINE, Model, Outcome, Rows, Step, Tables, first_difference, in_pieces, of_type};
use crate::backend::{GraphMode, LinkMode};
use crate::runtime::Membership;
use crate::{CudaError, Gpu, Runtime, nccl::Nccl};

/// How long a peer that never comes is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// How much longer it may take until the wait has ended, and everything is freed.
const GRACE: Duration = Duration::from_secs(3);

/// A check: what was found, or what is wrong.
type Body<'a> = &'a dyn Fn() -> Result<String, String>;

/// Runs the checks; `report` is called after each. Without the library they are skipped.
pub fn run(gpu: &Gpu, report: &mut dyn FnMut(&Check)) -> Vec<Check> {
    let missing = Nccl::load(gpu.nccl()).err();
    let bodies: [(&str, Body<'_>); 3] = [
        ("NCCL, one rank", &|| one_rank(gpu)),
        ("NCCL, a peer that never comes: deadline", &|| missing_peer(gpu, Ending::Deadline)),
        ("NCCL, a peer that never comes: abort flag", &|| missing_peer(gpu, Ending::Flag)),
    ];
    let check = |(name, body): (&str, Body<'_>)| {
        let started = Instant::now();
        let outcome = match &missing {
            Some(reason) => Outcome::Skipped(reason.to_string()),
            None => body().into(),
        };
        let check = Check { name: name.into(), outcome, duration: started.elapsed() };
        report(&check);
        check
    };
    bodies.into_iter().map(check).collect()
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

/// Prompt, tokens one by one, graphs: all with gathers of one.
fn one_rank(gpu: &Gpu) -> Result<String, String> {
    let model = Model::new(&of_type(WeightType::Q4_K)).map_err(text)?;
    let steps = in_pieces(&model.prompt(5, 40), &[17, 1]);
    let expected = model.run(gpu, 1, &steps)?;
    for graphs in [GraphMode::Off, GraphMode::Auto] {
        let linked = gpu.clone().with_graphs(graphs).with_links(LinkMode::Always);
        if let Some(row) = first_difference(&expected, &linked_rows(&model, &linked, &steps)?) {
            return Err(format!("row {row} has other bits ({graphs:?} graphs)"));
        }
    }
    let nccl = Nccl::load(gpu.nccl()).map_err(text)?;
    Ok(format!("NCCL {} from {}, {} rows of the same bits", nccl.version(), nccl.place(), expected.len()))
}

fn linked_rows(model: &Model, gpu: &Gpu, steps: &[Step]) -> Result<Rows, String> {
    let plan = SplitPlan::new(&model.config, 1).map_err(text)?;
    let mut decoder = model.decoder(gpu, &plan, 0, steps).map_err(text)?;
    let (mut solo, abort) = (Solo::new(), AbortFlag::new());
    let mut group = Group { collective: &mut solo, connect_deadline: DEADLINE, deadline: DEADLINE, abort };
    match decoder.join(&mut group).map_err(text)? {
        Route::Direct(_) => {}
        route => return Err(format!("it was not used: {route}")),
    }
    let tables = Tables::of(steps);
    let mut rows = Rows::new();
    for step in steps {
        rows.extend(tables.run(&mut decoder, &mut solo, step).map_err(text)?);
    }
    Ok(rows)
}

#[derive(Clone, Copy)]
enum Ending {
    Deadline,
    Flag,
}

/// The first of two ranks waits for the second.
fn missing_peer(gpu: &Gpu, ending: Ending) -> Result<String, String> {
    let mut driver = gpu.driver().map_err(text)?;
    let (abort, connect_deadline) = (
        AbortFlag::new(),
        match ending {
            Ending::Deadline => PATIENCE,
            Ending::Flag => DEADLINE,
        },
    );
    let flag = abort.clone();
    let membership = Membership {
        id: driver.link_id().map_err(text)?,
        rank: 0,
        n_ranks: 2,
        connect_deadline,
        deadline: DEADLINE,
        is_aborted: Box::new(move || flag.is_set()),
    };
    let started = Instant::now();
    let joined = thread::scope(|scope| {
        if let Ending::Flag = ending {
            scope.spawn(|| {
                thread::sleep(PATIENCE);
                abort.abort();
            });
        }
        driver.join(membership)
    });
    let error = joined.err().ok_or("a rank that is not there has joined")?;
    let is_right = matches!(
        (ending, &error),
        (Ending::Deadline, CudaError::Late { .. }) | (Ending::Flag, CudaError::Aborted { .. })
    );
    if !is_right || error.kind() != ErrorKind::Unavailable {
        return Err(format!("another error: {error}"));
    }
    // The device goes on.
    let memory = driver.alloc(4).map_err(text)?;
    driver.download(memory, &mut [0; 4]).map_err(text)?;
    drop(driver);
    match started.elapsed() {
        elapsed if elapsed > PATIENCE + GRACE => Err(format!("it took {elapsed:?}: {error}")),
        elapsed => Ok(format!("after {:.2} s: {error}", elapsed.as_secs_f64())),
    }
}
