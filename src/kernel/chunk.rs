//! Fixed chunking. Work is cut by position and never by thread count, and partial results are
//! combined in chunk order, so that threads never change a bit.
use crate::error::{Error, Result};
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Elements of one chunk (256 KiB of f32): large enough to hide the hand-over, small enough for L2.
pub const CHUNK: usize = 1 << 16;

/// Runs `f` on a pool of `threads` threads (at least one). Pools are made once and kept.
pub fn install<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    type Pools = BTreeMap<(u32, usize), Arc<ThreadPool>>;
    static POOLS: OnceLock<Mutex<Pools>> = OnceLock::new();
    // A forked process (a data loader's worker) has the pools of its parent, but not their threads.
    let key = (std::process::id(), threads.max(1));
    let pool = {
        let mut pools =
            POOLS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        match pools.get(&key) {
            Some(pool) => Some(Arc::clone(pool)),
            None => ThreadPoolBuilder::new()
                .num_threads(key.1)
                .build()
                .ok()
                .map(|pool| Arc::clone(pools.entry(key).or_insert(Arc::new(pool)))),
        }
    };
    match pool {
        Some(pool) => pool.install(f),
        None => f(), // no thread could be started: the calling one does the work
    }
}

/// Work that can be cut in two at a position.
pub(crate) trait Divide: Sized + Send {
    /// How many elements there are.
    fn len(&self) -> usize;
    /// The first `at` elements and the rest.
    fn divide(self, at: usize) -> (Self, Self);
}

/// Runs `f` on pieces of at most `grain` elements, in parallel and without allocating.
pub(crate) fn each<W: Divide>(threads: usize, grain: usize, work: W, f: impl Fn(W) + Sync) {
    if work.len() <= grain {
        f(work); // handing over would cost more than the work
    } else {
        install(threads, || halve(grain, work, &f));
    }
}

fn halve<W: Divide>(grain: usize, work: W, f: &(impl Fn(W) + Sync)) {
    let pieces = work.len().div_ceil(grain);
    if pieces < 2 {
        return f(work);
    }
    let (a, b) = work.divide(pieces / 2 * grain);
    rayon::join(|| halve(grain, a, f), || halve(grain, b, f));
}

/// Refuses a buffer of another length.
pub(crate) fn check_len(name: &str, got: usize, want: usize) -> Result<()> {
    if got == want { Ok(()) } else { Err(Error::Length { name: name.to_string(), got, want }) }
}
