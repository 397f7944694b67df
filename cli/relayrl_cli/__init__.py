"""The command relayrl: starts, drives and inspects a stack."""
