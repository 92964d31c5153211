//! The machine against a world of simulated observers, in simulated time.

mod matrix;
mod properties;
mod world;
