//! MQTT broker for clients and devices.
