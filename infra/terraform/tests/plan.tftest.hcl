# What holds of every plan. The provider is mocked: no account, no network.
mock_provider "aws" {
  mock_data "aws_iam_policy_document" {
    defaults = {
      json = "{}"
    }
  }

  mock_resource "aws_s3_bucket" {
    override_during = plan
    defaults = {
      arn = "arn:aws:s3:::valr-prod"
    }
  }

  mock_data "aws_ec2_instance_type" {
    defaults = {
      instance_storage_supported = true
      total_instance_storage     = 8000
    }
  }

  mock_data "aws_eks_cluster" {
    defaults = {
      identity = [{
        oidc = [{
          issuer = "https://oidc.eks.eu-central-1.amazonaws.com/id/0123456789ABCDEF"
        }]
      }]
    }
  }
}

variables {
  region       = "eu-central-1"
  cluster_name = "research"
  subnet_ids   = ["subnet-0a1b2c3d"]
  bucket_name  = "valr-prod"
}

run "the_bucket_is_private_encrypted_and_versioned" {
  command = plan

  assert {
    condition = alltrue([
      aws_s3_bucket_public_access_block.store.block_public_acls,
      aws_s3_bucket_public_access_block.store.block_public_policy,
      aws_s3_bucket_public_access_block.store.ignore_public_acls,
      aws_s3_bucket_public_access_block.store.restrict_public_buckets,
    ])
    error_message = "The bucket could be made public."
  }

  assert {
    condition     = aws_s3_bucket_versioning.store.versioning_configuration[0].status == "Enabled"
    error_message = "An overwritten object would be lost."
  }

  assert {
    condition = alltrue([
      for rule in aws_s3_bucket_server_side_encryption_configuration.store.rule :
      rule.apply_server_side_encryption_by_default[0].sse_algorithm == "aws:kms"
    ])
    error_message = "Objects are not encrypted with a key of KMS."
  }
}

run "only_what_jobs_leave_behind_was_replaced_or_broke_off_expires" {
  command = plan

  assert {
    condition = [
      for rule in aws_s3_bucket_lifecycle_configuration.store.rule : rule.filter[0].prefix if length(rule.expiration) > 0
    ] == ["valr/jobs/"]
    error_message = "Artifacts would be deleted by age."
  }

  assert {
    condition = flatten([
      for rule in aws_s3_bucket_lifecycle_configuration.store.rule : rule.expiration[*].days
    ]) == [90]
    error_message = "A Job's request, messages and checkpoints would not stay for job_days."
  }

  assert {
    condition = [
      for rule in aws_s3_bucket_lifecycle_configuration.store.rule : rule.abort_incomplete_multipart_upload[0].days_after_initiation
      if rule.filter[0].prefix == ""
    ] == [7]
    error_message = "Parts of uploads that were never finished would stay, unseen."
  }

  assert {
    condition = flatten([
      for rule in aws_s3_bucket_lifecycle_configuration.store.rule : rule.noncurrent_version_expiration[*].noncurrent_days
    ]) == [7, 30]
    error_message = "Versions that were replaced would stay for ever."
  }
}

run "gpu_nodes_wait_at_zero_behind_a_taint" {
  command = plan

  assert {
    condition     = aws_eks_node_group.gpu.scaling_config[0].min_size == 0 && aws_eks_node_group.gpu.scaling_config[0].desired_size == 0
    error_message = "GPU nodes would cost money while nothing runs."
  }

  assert {
    condition     = [for taint in aws_eks_node_group.gpu.taint : "${taint.key}:${taint.effect}"] == ["nvidia.com/gpu:NO_SCHEDULE"]
    error_message = "Anything could be scheduled on GPU nodes."
  }

  assert {
    condition     = aws_eks_node_group.gpu.capacity_type == "ON_DEMAND"
    error_message = "Spot instances without being asked for."
  }

  assert {
    condition     = aws_launch_template.gpu.metadata_options[0].http_tokens == "required" && aws_launch_template.gpu.metadata_options[0].http_put_response_hop_limit == 1
    error_message = "Pods could take the node's rights from its metadata."
  }
}

run "a_job_that_asks_for_disk_gets_a_node_where_there_is_none" {
  command = plan

  assert {
    condition = {
      for tag in aws_autoscaling_group_tag.gpu : tag.tag[0].key => tag.tag[0].value
      } == {
      "k8s.io/cluster-autoscaler/node-template/resources/ephemeral-storage" = "6800G"
      "k8s.io/cluster-autoscaler/node-template/taint/nvidia.com/gpu"        = "present:NoSchedule"
    }
    error_message = "cluster-autoscaler would take a new node for one without a disk, or for one that takes any pod."
  }
}

run "a_node_without_local_disks_has_its_root_volume" {
  command = plan

  override_data {
    target = data.aws_ec2_instance_type.gpu
    values = {
      instance_storage_supported = false
    }
  }

  assert {
    condition     = aws_autoscaling_group_tag.gpu["resources/ephemeral-storage"].tag[0].value == "170G"
    error_message = "cluster-autoscaler would take a new node for a larger one."
  }
}

run "spot_is_one_variable" {
  command = plan

  variables {
    spot = true
  }

  assert {
    condition     = aws_eks_node_group.gpu.capacity_type == "SPOT"
    error_message = "spot = true changed nothing."
  }
}

run "images_keep_their_tags" {
  command = plan

  assert {
    condition     = aws_ecr_repository.image.image_tag_mutability == "IMMUTABLE"
    error_message = "A tag could name another image tomorrow."
  }
}

run "outputs_fit_the_recipe" {
  command = plan

  assert {
    condition     = output.bucket_url == "s3://valr-prod/valr"
    error_message = "bucket_url is not what cluster.bucket takes."
  }
}

run "only_three_service_accounts_reach_only_the_prefix" {
  command = plan

  assert {
    condition = toset(flatten([
      for condition in data.aws_iam_policy_document.trust.statement[0].condition : condition.values if endswith(condition.variable, ":sub")
      ])) == toset([
      "system:serviceaccount:valr:valr-mlflow",
      "system:serviceaccount:valr:valr-orchestrator",
      "system:serviceaccount:valr:valr-stage",
    ])
    error_message = "Other service accounts could take the role."
  }

  assert {
    condition = toset(flatten([
      for statement in data.aws_iam_policy_document.bucket.statement : statement.resources
    ])) == toset(["arn:aws:s3:::valr-prod", "arn:aws:s3:::valr-prod/valr/*"])
    error_message = "The role reaches more than the bucket."
  }
}

run "a_wrong_bucket_name_is_refused" {
  command = plan

  variables {
    bucket_name = "Valr_Prod"
  }

  expect_failures = [var.bucket_name]
}

run "a_checkpoint_outlives_a_long_wait" {
  command = plan

  variables {
    job_days = 3
  }

  expect_failures = [var.job_days]
}
