//! Channels for devices over TCP, TLS and UDP.
