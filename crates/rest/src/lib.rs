//! REST API, WebSocket feed and console.
