//! One binary: links once.
mod algebra;
mod architecture;
mod bits;
mod blending;
mod changing;
mod files;
mod hostile;
mod lines;
mod lowbit;
mod moving;
mod numbers;
mod outer;
mod random;
mod sampled;
mod selecting;
mod stepping;
