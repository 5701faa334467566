//! Commands to whichever link holds the device.
