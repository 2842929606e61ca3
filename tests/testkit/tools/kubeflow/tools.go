//go:build tools

// Package tools pins what the test cluster is built from: go.mod and go.sum beside it are the whole truth.
package tools

import (
	_ "github.com/kubeflow/trainer/v2/cmd/trainer-controller-manager"
	_ "sigs.k8s.io/jobset"
)
