//! One binary: links once.
mod architecture;
