//! Simulators, faulty disks and networks for tests.
