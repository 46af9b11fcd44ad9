"""Calibration statistics: second moments of layer inputs and Fisher information of layer outputs."""
