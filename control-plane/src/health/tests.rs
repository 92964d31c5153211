//! The machine against a world of simulated vantage points, in simulated time.

mod matrix;
mod properties;
mod world;
