//! Loops over slices: no Python, no libtorch, no domain word. The only place that names rayon and SIMD.
//!
//! Every kernel checks lengths and positions first and cannot fail or panic afterwards; its result
//! depends on its arguments alone, never on the number of threads or the processor.
pub mod adamw;
pub mod bits;
pub mod blend;
pub mod change;
pub mod chunk;
pub mod exchange;
pub mod gather;
pub mod lines;
pub mod lion;
pub mod lowbit;
pub mod made;
mod marks;
pub mod outer;
pub mod pack;
mod rank;
pub mod reduce;
pub mod rng;
mod rows;
pub mod sampled;
pub mod select;
pub mod sets;
pub mod sgd;
mod wide;
