variable "region" {
  description = "AWS region of the cluster, such as eu-central-1."
  type        = string
}

variable "cluster_name" {
  description = "Name of the EKS cluster. Its OIDC provider has to be registered with IAM."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets of the GPU nodes; one zone is best for several nodes of one Job."
  type        = list(string)

  validation {
    condition     = length(var.subnet_ids) > 0
    error_message = "subnet_ids is empty; name at least one private subnet of the cluster."
  }
}

variable "bucket_name" {
  description = "Name of the bucket, unique in all of AWS."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket_name))
    error_message = "bucket_name needs 3 to 63 lower case letters, digits and hyphens, and a letter or digit at both ends."
  }
}

variable "prefix" {
  description = "Where the project's objects lie in the bucket: cluster.bucket of the recipe is s3://BUCKET/PREFIX."
  type        = string
  default     = "valr"

  validation {
    condition     = can(regex("^[^/].*[^/]$", var.prefix))
    error_message = "prefix begins or ends with a slash; write it without, such as valr or team/valr."
  }
}

variable "namespace" {
  description = "Namespace of infra/k8s, whose service accounts get access to the bucket."
  type        = string
  default     = "valr"
}

variable "job_days" {
  description = "Days for which a Job's request, messages and checkpoints stay. Longer than the longest pause of a training."
  type        = number
  default     = 90

  validation {
    condition     = var.job_days >= 14
    error_message = "job_days is below 14; a training that waits two weeks for a GPU would lose its checkpoint."
  }
}

variable "gpu_instance_type" {
  description = "Instances of the GPU nodes; p4de.24xlarge has eight A100 of 80 GB and local NVMe disks."
  type        = string
  default     = "p4de.24xlarge"
}

variable "max_gpu_nodes" {
  description = "Most GPU nodes at a time; there are none while nothing runs."
  type        = number
  default     = 1
}

variable "spot" {
  description = "Whether GPU nodes are spot instances: cheaper, gone after two minutes' notice; a training resumes from its checkpoint."
  type        = bool
  default     = false
}
