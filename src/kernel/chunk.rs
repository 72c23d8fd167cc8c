//! Fixed chunking. Work is cut by position and never by thread count, and partial results are
//! combined in chunk order, so that threads never change a bit.
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Elements of one chunk (256 KiB of f32): large enough to hide the hand-over, small enough for L2.
pub const CHUNK: usize = 1 << 16;

/// Runs `f` on a pool of `threads` threads (at least one). Pools are made once and kept.
pub fn install<R: Send>(threads: usize, f: impl FnOnce() -> R + Send) -> R {
    static POOLS: OnceLock<Mutex<BTreeMap<usize, Arc<ThreadPool>>>> = OnceLock::new();
    let threads = threads.max(1);
    let pool = {
        let mut pools = POOLS.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        match pools.get(&threads) {
            Some(pool) => Some(Arc::clone(pool)),
            None => ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .ok()
                .map(|pool| Arc::clone(pools.entry(threads).or_insert(Arc::new(pool)))),
        }
    };
    match pool {
        Some(pool) => pool.install(f),
        None => f(), // no thread could be started: the calling one does the work
    }
}
