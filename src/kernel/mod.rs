//! Loops over slices: no Python, no libtorch, no domain word. The only place that names rayon and SIMD.
pub mod chunk;
